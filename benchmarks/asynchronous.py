"""Asynchronous rollouts beside turns: reward reached, and time, on the demo's task.

For each seed the demo's warm-started model is trained twice by RLSD with one SGLang server and one
trainer process: rollout and training in turns, and with ``--staleness``. Compared are the mean
reward of the last ten steps, the time of a step, and how long the trainer had nothing to do but
wait for responses. Needs `make sglang-cpu` and a model of `make demo`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path

from megatron_rlsd.observability import read_metrics
from megatron_rlsd.observability.trace import read_trace

ROOT = Path(__file__).parents[1]
LAST = 10


def train(args: argparse.Namespace, seed: int, staleness: int, run_dir: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "megatron_rlsd.train", str(ROOT / "examples/configs/tiny.yaml")]
    command += [
        f"run_dir={run_dir}",
        f"model.hf_path={args.model}",
        f"train.steps={args.steps}",
        f"train.seed={seed}",
        "rollout.engine=sglang",
        f"rollout.asynchronous.max_staleness={staleness}",
        f"algorithm.tis={'sequence' if staleness else 'none'}",
        f"optimizer.lr={args.lr}",
        "data.eval=[]",
        "observability.trace=true",
        "observability.tensorboard=false",
        "observability.progress=none",
        f"weight_sync.transport={args.transport}",
    ]
    subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL)
    steps = read_metrics(run_dir / "metrics.jsonl")
    events = [e for e in read_trace(run_dir / "trace/trace.json") if e["ph"] == "X"]
    rollouts = [e for e in events if e["name"] == "rollouts"]
    busy = [e for e in events if e["name"] in ("score", "update", "weight_sync")]
    hidden = sum(overlap(a, b) for a, b in product(rollouts, busy))
    later = steps[2:]  # the first ones compile and warm caches
    return {
        "reward": statistics.fmean(s["rollout/reward_mean"] for s in steps[-LAST:]),
        "first": statistics.fmean(s["rollout/reward_mean"] for s in steps[:3]),
        "step_s": statistics.median(s["time/step_s"] for s in later),
        "rollout_s": statistics.median(s["time/rollout_s"] for s in later),
        "staleness": statistics.fmean(s.get("rollout/staleness_mean", 0.0) for s in later),
        "overlap_s": hidden / 1e6 / len(steps),
    }


def overlap(a: dict[str, float], b: dict[str, float]) -> float:
    return max(0.0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs/tiny/sft/hf/final")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/asynchronous")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--transport", default="ipc", choices=["disk", "broadcast", "ipc"])
    args = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, {packages}")
    print(f"load average before: {os.getloadavg()[0]:.1f}; {args.steps} steps, {args.transport}")
    print("seed  staleness  reward first  last  s/step  s waiting  overlap s/step  mean staleness")
    found: dict[int, list[dict[str, float]]] = {0: [], args.staleness: []}
    for seed in range(args.seeds):
        for staleness in sorted(found, reverse=seed % 2 == 1):
            run_dir = args.runs / f"seed_{seed}_staleness_{staleness}"
            each = train(args, seed, staleness, run_dir)
            found[staleness].append(each)
            print(
                f"{seed:4}  {staleness:9}  {each['first']:12.3f}  {each['reward']:.3f} "
                f"{each['step_s']:6.2f}  {each['rollout_s']:9.2f}  {each['overlap_s']:14.2f}  "
                f"{each['staleness']:14.2f}",
                flush=True,
            )
    for staleness, runs in found.items():
        rewards = [each["reward"] for each in runs]
        spread = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        print(
            f"staleness {staleness}: reward {statistics.fmean(rewards):.3f} +- {spread:.3f} "
            f"(standard deviation over seeds), {statistics.fmean(e['step_s'] for e in runs):.2f} "
            "s/step"
        )


if __name__ == "__main__":
    main()
