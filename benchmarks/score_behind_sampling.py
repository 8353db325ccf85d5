"""RLSD's step against GRPO's, beside one SGLang server: scored behind sampling, and after it.

Each round makes a short run of each kind on chain_sum at its committed sizes (one trainer process,
one server), in an order that turns. Compared are medians of the steps' times within a round, so
that what else the machine does is in both. Needs `make sglang-cpu` and a warm-started model
(examples/experiments/claims.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_rlsd.observability import read_metrics

ROOT = Path(__file__).parents[1]
KINDS = {
    "grpo": ["algorithm.name=grpo"],
    "rlsd, scored after": [],
    "rlsd, scored behind": ["rollout.score_while_sampling=true"],
}
WARM_UP = 1
"""Steps that are not counted."""


def train(args: argparse.Namespace, kind: str, run_dir: Path) -> dict[str, float]:
    """Median seconds of a step and its phases."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "megatron_rlsd.train", str(ROOT / "examples/experiments/chain_sum.yaml")]
    command += [
        f"run_dir={run_dir}",
        f"model.hf_path={args.model}",
        f"train.steps={args.steps}",
        "rollout.engine=sglang",
        f"rollout.sglang.max_in_flight={args.in_flight}",
        "weight_sync.transport=ipc",
        "weight_sync.parity_interval=0",
        "data.eval=[]",
        *KINDS[kind],
    ]
    subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)
    steps = [s for s in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in s][WARM_UP:]
    names = ("step", "rollout", "early_score", "score", "update", "weight_sync")
    return {n: statistics.median(s.get(f"time/{n}_s", 0.0) for s in steps) for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs/claims/chain_sum/model")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/score_behind_sampling")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=256, help="requests at the server at once")
    args = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores; {args.steps} steps, {args.in_flight} at")
    print("once; load is the average of one minute, before the run")
    print(f"{'round':5}  {'kind':20} load   step  rollout  early  score  update  sync")
    ratios: dict[str, list[float]] = {kind: [] for kind in list(KINDS)[1:]}
    for number in range(args.rounds):
        turned = list(KINDS)[number % 3 :] + list(KINDS)[: number % 3]
        found = {}
        for kind in turned:
            load = os.getloadavg()[0]
            run_dir = args.runs / f"{number}_{kind.replace(', ', '_').replace(' ', '_')}"
            found[kind] = each = train(args, kind, run_dir)
            print(
                f"{number:5}  {kind:20} {load:4.1f}  {each['step']:5.2f}  {each['rollout']:7.2f}  "
                f"{each['early_score']:5.2f}  {each['score']:5.2f}  {each['update']:6.2f}  "
                f"{each['weight_sync']:4.2f}",
                flush=True,
            )
        for kind, shares in ratios.items():
            shares.append(found[kind]["step"] / found["grpo"]["step"])
    for kind, shares in ratios.items():
        rounds = ", ".join(f"{share:.2f}" for share in shares)
        print(f"{kind}: {statistics.median(shares):.2f} times GRPO's step (rounds: {rounds})")


if __name__ == "__main__":
    main()
