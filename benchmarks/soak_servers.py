"""Weight updates under asynchronous load on real SGLang servers that are killed at random.

    python benchmarks/soak_servers.py OUT [--updates 300] [--every 10] [--seed 0]

A small random model is trained with asynchronous rollouts on two servers (`make sglang-cpu`). About
every ``--every`` updates, at a random moment, one server's processes get SIGKILL. Every response
that is trained on is computed anew by transformers, token for token with the weights of the version
that its label names: no log-probability may be off by more than 1e-4, no version may be unknown,
and a stop token may only stand at the end. checks.jsonl gets a line a step. The program may be
ended at any moment and started again: the run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_rlsd import train
from megatron_rlsd.config import parse_config
from megatron_rlsd.rollout.sglang import engine as sglang_engine
from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.run.run import Run
from megatron_rlsd.types import Trajectory

ROOT = Path(__file__).parents[1]
STALENESS = 2
BOUND = 1e-4
SIZES = ["--vocab-size=320", "--hidden-size=32", "--layers=2", "--ffn-size=64", "--head-dim=16"]


def settings(out: Path, updates: int) -> dict[str, Any]:
    source = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "seed": 1,
        "size": 1000,
        "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    }
    return {
        "run_dir": str(out / "run"),
        "model": {"hf_path": str(out / "model"), "dtype": "float32"},
        "data": {"train": [source]},
        "prompts": {"format_instruction": "End with #### and the answer."},
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 4,
            "n_samples_per_prompt": 4,
            "max_response_tokens": 128,
            "asynchronous": {"max_staleness": STALENESS},
            "sglang": {
                "device": "cpu",
                "num_servers": 2,
                "start_timeout_seconds": 1500,
                "request_timeout_seconds": 300,
                "generate_timeout_seconds": 1500,
                "update_timeout_seconds": 300,
                "health_interval_seconds": 5,
                "max_restarts": 1000,
            },
        },
        "reward": {
            "functions": [{"name": f"{ROOT}/examples/rewards/even_digits.py:even_digits"}],
            "workers": 1,
        },
        "algorithm": {"tis": "sequence"},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": updates, "max_tokens_per_microbatch": 4096},
        "checkpoint": {"interval": 10},
        "weight_sync": {"parity_interval": 0},
        "observability": {"tensorboard": False, "progress": "plain"},
        "distributed": {"timeout_seconds": 1800},
    }


class Soak:
    """What is added to the training loop: weights kept by version, servers killed, tokens checked.

    The loop calls it at the two places that it wraps, ``Run.publish_weights`` and ``Run.rollout``.
    """

    def __init__(self, out: Path, every: int, seed: int) -> None:
        self.lines = out / "checks.jsonl"
        self.every, self.random = every, random.Random(f"{seed}/{os.getpid()}")
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.reference = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        self.servers: list[Any] = []
        self.killed = 0

    def published(self, run: Run, version: int) -> None:
        """Before the servers get them."""
        self.weights[version] = {name: t.detach().clone() for name, t in run.actor.hf_tensors()}
        for old in [each for each in self.weights if each < version - STALENESS - 1]:
            del self.weights[old]

    def kill_sometimes(self) -> None:
        if self.random.randrange(self.every) == 0:
            after = self.random.random() * 3  # an update, or what is sampled after it
            threading.Timer(after, self._kill).start()

    def _kill(self) -> None:
        victim = self.random.choice(self.servers)
        if victim.process is not None:
            os.killpg(victim.process.group, signal.SIGKILL)
            self.killed += 1

    def check(self, step: int, trajectories: list[Trajectory], stops: set[int]) -> None:
        worst, tokens, mixed = 0.0, 0, 0
        for trajectory in trajectories:
            generation = trajectory.generation
            versions = torch.from_numpy(versions_of(generation).astype("int64"))
            ids = generation.token_ids.tolist()
            if stops & set(ids[:-1]):
                raise SystemExit(f"step {step}: a stop token within a response: {ids}")
            told = torch.from_numpy(generation.log_probs)
            labels = sorted(set(versions.tolist()))
            for version in labels:
                if version not in self.weights:
                    raise SystemExit(f"step {step}: no weights have the version {version}")
                mine = versions == version
                computed = self.log_probs(version, trajectory.prompt_ids.tolist(), ids)
                worst = max(worst, float((told - computed)[mine].abs().max()))
            tokens, mixed = tokens + len(ids), mixed + (len(labels) > 1)
        line: dict[str, float] = {
            "step": step,
            "responses": len(trajectories),
            "tokens": tokens,
            "mixed": mixed,
        }
        line |= {"worst": worst, "killed": self.killed, "time": round(time.time())}
        self.killed = 0
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not worst <= BOUND:
            raise SystemExit(f"step {step}: a token is {worst} from the weights that it names")

    @torch.no_grad()
    def log_probs(self, version: int, prompt: list[int], response: list[int]) -> torch.Tensor:
        """[T] log-probabilities of the response under the weights of ``version``."""
        self.reference.load_state_dict(self.weights[version], strict=False)
        ids = torch.tensor([prompt + response])
        logits = self.reference(ids).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def install(soak: Soak) -> None:
    publish, rollout = Run.publish_weights, Run.rollout
    start = sglang_engine.SGLangEngine.__init__

    @functools.wraps(start)
    def started(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        soak.servers = self.fleet.servers

    @functools.wraps(publish)
    def published(self: Run, version: int) -> dict[str, float]:
        soak.published(self, version)
        if version:
            soak.kill_sometimes()
        return publish(self, version)

    @functools.wraps(rollout)
    def rolled_out(self: Run, step: int) -> Any:
        found = rollout(self, step)
        trajectories = [t for group in found[0] for t in group.trajectories]
        soak.check(step, trajectories, set(self.tokenizer.stop_token_ids))
        return found

    sglang_engine.SGLangEngine.__init__ = started  # type: ignore[method-assign]
    Run.publish_weights, Run.rollout = published, rolled_out  # type: ignore[method-assign]


def summary(lines: Path) -> str:
    """Counts over all starts; a step trained again after an interruption was checked again."""
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    total = {key: sum(line[key] for line in found) for key in ("responses", "tokens", "mixed")}
    updates, killed = len({line["step"] for line in found}), sum(line["killed"] for line in found)
    worst = max(line["worst"] for line in found)
    return (
        f"{updates} updates ({len(found)} with those made again), {killed} servers killed; "
        f"{total['tokens']} tokens of {total['responses']} responses, {total['mixed']} of them of "
        f"several versions: at most {worst:.2g} from the weights that they name"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="updates from one kill to the next")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    raw = settings(out, args.updates)
    if not (out / "model/config.json").exists():
        config = out / "config.yaml"
        config.write_text(yaml.safe_dump(raw))
        tool = [sys.executable, str(ROOT / "tools/make_tiny_model.py"), str(config)]
        subprocess.run([*tool, str(out / "model"), *SIZES, "--problems=200"], check=True)
    soak = Soak(out, args.every, args.seed)
    install(soak)
    try:
        train.train(parse_config(raw))
    finally:
        if soak.lines.exists():
            print(summary(soak.lines), flush=True)


if __name__ == "__main__":
    main()
