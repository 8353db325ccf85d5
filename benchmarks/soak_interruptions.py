"""A long run that is killed, stalled or out of disk every few steps, against one left in peace.

    python benchmarks/soak_interruptions.py OUT [--steps 300] [--every 20] [--seed 0]

A small random model is trained twice on two ranks. The first run is left in peace. In each block of
``--every`` steps of the second one, at a random moment of a random step, one of these happens:

- ``kill_rank``: one rank gets SIGKILL; ``kill_all``: the launcher and both ranks get it;
- ``kill_start``: as kill_all, and the next start is killed at a random moment as well;
- ``stall``: one rank gets SIGSTOP, which the run has to notice and end by itself;
- ``pause``: one rank is stopped for three seconds and goes on, as a busy machine would have it;
- ``full_disk``: the disk that holds run_dir is filled, until the run has ended.

Each time the same command is given again. At the end the figures of every step, the samples, the
exported weights and all files of tensors in the last checkpoint must be those of the first run, bit
by bit. Started again with the same OUT, the program goes on where it was ended. To mount the small
disk is root's; for others the disk faults are left out, which the last line says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml

from megatron_rlsd.checkpoint.manifest import read_manifest
from megatron_rlsd.observability import read_metrics

ROOT = Path(__file__).parents[1]
KINDS = ("kill_rank", "kill_all", "kill_start", "stall", "pause", "full_disk")
STALL_SECONDS = 20.0
PAUSE_SECONDS = 3.0
PATIENCE = 600.0
"""Seconds within which a run must have ended that cannot go on, or have made its next step."""
DISK = "size=64m"
SIZES = ["--vocab-size=320", "--hidden-size=32", "--layers=2", "--ffn-size=64", "--head-dim=16"]


def settings(out: Path, steps: int) -> dict[str, Any]:
    source = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "size": 1000,
        "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    }
    return {
        "run_dir": str(out / "quiet"),
        "model": {"hf_path": str(out / "model"), "dtype": "float32"},
        "data": {"train": [{**source, "seed": 1}], "eval": [{**source, "seed": 2}]},
        "prompts": {
            "format_instruction": "End with #### and the answer.",
            "sft_response": "{reference_solution}\n#### {answer}",
        },
        "rollout": {"prompts_per_step": 4, "n_samples_per_prompt": 4, "max_response_tokens": 12},
        "reward": {
            "functions": [{"name": f"{ROOT}/examples/rewards/even_digits.py:even_digits"}],
            "workers": 1,
        },
        "algorithm": {"rlsd_lambda": 0.5, "kl_coef": 0.01},
        "teacher": {"mode": "ema"},
        "optimizer": {"lr": 1e-3, "distributed": True, "lr_warmup_steps": 10},
        "train": {"steps": steps, "max_tokens_per_microbatch": 256},
        "eval": {"num_problems": 4, "n_samples": 1, "interval": 25, "pass_at_k": [1]},
        "checkpoint": {"interval": 4, "keep": 2},
        "observability": {"tensorboard": False, "progress": "none"},
        "distributed": {"timeout_seconds": 120, "stall_seconds": STALL_SECONDS},
    }


class Trainer:
    """``rlsd train`` on two ranks, in a process group of its own."""

    def __init__(self, config: Path, run_dir: Path, log: Path) -> None:
        words = ["train", str(config), "--nproc", "2", f"run_dir={run_dir}"]
        command = [sys.executable, "-W", "ignore", "-m", "megatron_rlsd", *words]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def rank(self, number: int) -> psutil.Process | None:
        """None where it has not started, or has ended."""
        try:
            for child in psutil.Process(self.process.pid).children():
                if child.environ().get("RANK") == str(number):
                    return child
        except psutil.Error:
            pass
        return None

    def kill_all(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        for number in (0, 1):  # the launcher gives each rank a session of its own
            if (rank := self.rank(number)) is not None:
                rank.kill()
        self.process.wait()


class Soak:
    """The second run and what is done to it; faults.jsonl has a line for each fault."""

    def __init__(self, out: Path, config: Path, steps: int, every: int, seed: int) -> None:
        self.out, self.config, self.steps, self.every, self.seed = out, config, steps, every, seed
        self.disk = out / "disk"
        self.run_dir = self.disk / "run"
        self.log = out / "trainer.log"
        self.faults = out / "faults.jsonl"
        self.can_fill = self._mount()

    def _mount(self) -> bool:
        self.disk.mkdir(exist_ok=True)
        if os.path.ismount(self.disk):
            return True
        if self.faults.exists():  # what the disk held is gone with it
            self.faults.unlink()
        mount = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(self.disk)]
        return os.getuid() == 0 and subprocess.run(mount, check=False).returncode == 0

    def done(self) -> list[dict[str, Any]]:
        if not self.faults.exists():
            return []
        return [json.loads(line) for line in self.faults.read_text().splitlines()]

    def run(self) -> None:
        first = len(self.done())
        for number in range(first, self.steps // self.every):
            rng = random.Random(f"{self.seed}/{number}")
            kinds = [kind for kind in KINDS if self.can_fill or kind != "full_disk"]
            kind = kinds[number % len(kinds)] if number < len(kinds) else rng.choice(kinds)
            step = number * self.every + rng.randrange(1, self.every)
            began = time.monotonic()
            trainer = self._start()
            self._wait_for(step, trainer)
            time.sleep(rng.random() * 1.5)  # a step takes about half a second
            facts = getattr(self, kind)(trainer, rng)
            if trainer.process.poll() is None and kind != "pause":
                raise SystemExit(f"fault {number} ({kind}): the run neither went on nor ended")
            line = {"number": number, "kind": kind, "step": step, "reached": self.reached()}
            line |= {"exit_code": trainer.process.poll(), **facts}
            line |= {"seconds": round(time.monotonic() - began, 1)}
            if trainer.process.poll() is None:
                self._running = trainer
            with self.faults.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        trainer = self._start()
        if code := trainer.process.wait(PATIENCE * 10):
            raise SystemExit(f"the last start ended with exit code {code}; see {self.log}")

    _running: Trainer | None = None

    def _start(self) -> Trainer:
        trainer, self._running = self._running, None
        return trainer or Trainer(self.config, self.run_dir, self.log)

    def reached(self) -> int:
        """Steps in metrics.jsonl."""
        try:
            lines = read_metrics(self.run_dir / "metrics.jsonl")
        except FileNotFoundError:
            return 0
        return max((line["step"] + 1 for line in lines if "train/loss" in line), default=0)

    def _wait_for(self, step: int, trainer: Trainer) -> None:
        deadline, last = time.monotonic() + PATIENCE, -1
        while (reached := self.reached()) < step:
            if trainer.process.poll() is not None:
                raise SystemExit(
                    f"the run ended by itself at step {reached} with exit code "
                    f"{trainer.process.returncode}; see {self.log}"
                )
            if reached > last:
                deadline, last = time.monotonic() + PATIENCE, reached
            if time.monotonic() > deadline:
                raise SystemExit(f"no step for {PATIENCE:g} s at step {reached}; see {self.log}")
            time.sleep(0.05)

    def kill_rank(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        victim = rng.randrange(2)
        if (rank := trainer.rank(victim)) is not None:
            rank.kill()
        trainer.process.wait(PATIENCE)
        return {"rank": victim}

    def kill_all(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        trainer.kill_all()
        return {}

    def kill_start(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        trainer.kill_all()
        again = self._start()
        after = rng.random() * 15
        time.sleep(after)
        ended = again.process.poll()
        if ended is None:
            again.kill_all()
        return {"second_after": round(after, 2), "second_ended": ended}

    def stall(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        victim = rng.randrange(2)
        rank, began = trainer.rank(victim), time.monotonic()
        if rank is not None:
            rank.suspend()
        trainer.process.wait(PATIENCE)
        if rank is not None and rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
            raise SystemExit(f"rank {victim}, stopped by a signal, outlived its run")
        return {"rank": victim, "noticed_after": round(time.monotonic() - began, 1)}

    def pause(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        victim = rng.randrange(2)
        if (rank := trainer.rank(victim)) is not None:
            rank.suspend()
            time.sleep(PAUSE_SECONDS)
            rank.resume()
        return {"rank": victim}

    def full_disk(self, trainer: Trainer, rng: random.Random) -> dict[str, Any]:
        filler = self.disk / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while trainer.process.poll() is None:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        time.sleep(0.05)
        finally:
            filler.unlink()
        if trainer.process.returncode != 2:
            raise SystemExit(f"a full disk ended the run with {trainer.process.returncode}, not 2")
        return {"message": json.loads((self.run_dir / "status.json").read_text())["message"]}


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time", "perf/", "memory/"))
        }
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def contents(run_dir: Path) -> dict[str, str]:
    """Digest of every sample, exported weight, and file of tensors in the last checkpoint."""
    found = {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("samples/*.jsonl", "hf/final/*.safetensors")
        for path in sorted(run_dir.glob(pattern))
    }
    last = max((run_dir / "checkpoints").glob("step_*"))
    checksums = read_manifest(last).checksums
    tensors = (".distcp", ".safetensors")
    return found | {f"{last.name}/{n}": c for n, c in checksums.items() if n.endswith(tensors)}


def compare(quiet: Path, soaked: Path, steps: int) -> None:
    one, other = lines_of(quiet), lines_of(soaked)
    if one != other:
        differing = [a["step"] for a, b in zip(one, other, strict=False) if a != b]
        raise SystemExit(
            f"metrics differ ({len(one)}, {len(other)} lines), first at {differing[:1]}"
        )
    trained = sum("train/loss" in line for line in one)
    files, others = contents(quiet), contents(soaked)
    wrong = sorted(
        name for name in files.keys() | others.keys() if files.get(name) != others.get(name)
    )
    if wrong or trained != steps:
        raise SystemExit(f"{trained} of {steps} steps; files that differ: {wrong}")
    print(
        f"bit-equal: {trained} steps of metrics, {len(files)} files of samples, weights and state"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps from one fault to the next")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(settings(out, args.steps)))
    if not (out / "model/config.json").exists():
        tool = [sys.executable, str(ROOT / "tools/make_tiny_model.py"), str(config)]
        subprocess.run([*tool, str(out / "model"), *SIZES, "--problems=200"], check=True)
    began = time.monotonic()
    if not (out / "quiet/hf/final/config.json").exists():
        quiet = Trainer(config, out / "quiet", out / "quiet.log")
        if code := quiet.process.wait(PATIENCE * 10):
            raise SystemExit(f"the run in peace ended with exit code {code}; see {out}/quiet.log")
        print(f"in peace: {args.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    soak = Soak(out, config, args.steps, args.every, args.seed)
    soak.run()
    compare(out / "quiet", soak.run_dir, args.steps)
    kinds = Counter(line["kind"] for line in soak.done())
    print(f"faults: {dict(sorted(kinds.items()))}" + "" * soak.can_fill)
    if not soak.can_fill:
        print("no disk could be mounted: full disks were left out")
    if os.path.ismount(soak.disk):
        shutil.copytree(soak.run_dir, out / "run", dirs_exist_ok=True)
        subprocess.run(["umount", str(soak.disk)], check=False)


if __name__ == "__main__":
    main()
