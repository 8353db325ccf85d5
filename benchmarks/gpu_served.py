"""Stage of gpu_day: the real program and a real SGLang server in turns on one GPU.

    SGLANG_PYTHON=... python benchmarks/gpu_served.py --out OUT/served.json [--wide] [--toy]

Weights travel as CUDA IPC handles, every publication is compared by checksums, and the server
sleeps while the trainer trains. The model is gpu_loop's; with ``--wide`` four layers of Qwen3-8B's
widths, for the bandwidth of publications. The exit status is 1 where a check failed: the file names
it. ``--toy`` takes SGLang on the CPU, where nothing is freed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_loop import SMOLLM2, make_model, medians, step_rows, timed, write_inputs
from results_file import ResultsFile, machine

WIDE = {
    "hidden-size": 4096,
    "layers": 4,
    "heads": 32,
    "kv-heads": 8,
    "head-dim": 128,
    "ffn-size": 12288,
}
SERVER_ARGS = {
    # What needs none of the packages that compile or hold kernels for minutes or gigabytes.
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "skip_server_warmup": True,
    "disable_flashinfer_autotune": True,
}
STATIC_SHARE = 0.3
"""The share of the GPU's memory that the server holds while it is awake."""
MOST_DIFFERENCE = 0.05
"""Mean of |log-probability of the engine - of the trainer|; bfloat16 kernels differ by 0.01."""
LOG_LINES = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="decode in CUDA graphs")
    parser.add_argument("--toy", action="store_true", help="CPU, toy sizes, two steps")
    args = parser.parse_args()
    steps = 2 if args.toy else args.steps
    out = ResultsFile(args.out, {"machine": machine(torch.device("cpu" if args.toy else "cuda"))})
    with tempfile.TemporaryDirectory(prefix="gpu_served_") as name:
        folder = Path(name)
        changes = settings(args.toy, args.graphs)
        config = write_inputs(folder, steps, args.toy, changes)
        sizes = {} if args.toy else WIDE if args.wide else SMOLLM2
        make_model(out, config, folder / "model", sizes)
        used: list[int] = []
        try:
            with contextlib.nullcontext() if args.toy else watched_memory(used):
                timed(out, "train", ["-m", "megatron_rlsd.train", str(config)])
        finally:
            keep_server_log(folder / "run", args.out.with_suffix(".server.log"))
            out.add("gpu_used_mib", {"least": min(used), "most": max(used)} if used else None)
        rows = step_rows(folder / "run")
        out.add("by_step", [chosen(row) for row in rows])
        out.add("metrics", medians(rows))
        out.add("gigabytes_per_second", [bandwidth(row) for row in rows])
        failed = list(failures(rows, steps, versions(folder / "run")))
        if not args.toy:
            out.add("freed_gib", freed := awake_less_asleep(used))
            if freed < 0.5 * STATIC_SHARE * total_gib():
                failed.append(f"the server's sleep freed {freed:.1f} GiB")
        out.add("failed", failed)
    return 1 if failed else 0


def settings(toy: bool, graphs: bool) -> dict[str, dict[str, Any]]:
    """Sections of the configuration beside those of gpu_loop."""
    server: dict[str, Any] = {"start_timeout_seconds": 300 if toy else 100}
    if python := os.environ.get("SGLANG_PYTHON"):
        server["python"] = python
    if not toy:
        server["args"] = SERVER_ARGS | {"mem_fraction_static": STATIC_SHARE}
        if graphs:
            server["args"] |= {
                "cuda_graph_backend_decode": "full",
                "cuda_graph_bs_decode": [64, 256],
            }
    return {
        "rollout": {"engine": "sglang", "colocated": True, "sglang": server},
        "weight_sync": {"transport": "ipc", "verify_interval": 1, "parity_interval": 2},
    }


@contextlib.contextmanager
def watched_memory(used: list[int]) -> Iterator[None]:
    """Append MiB in use on the first GPU, by all processes together, every 100 ms."""
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "-lms", "100"]
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            used.extend(int(line) for line in process.stdout if line.strip().isdigit())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            reader.join()


def keep_server_log(run_dir: Path, target: Path) -> None:
    for log in run_dir.glob("sglang/server_0.log"):
        lines = log.read_text(errors="replace").splitlines()
        target.write_text("\n".join(lines[-LOG_LINES:]) + "\n")


def versions(run_dir: Path) -> list[tuple[int, int]]:
    """Return step and version of the weights of every sampled response."""
    return [
        (int(path.stem.removeprefix("step_")), row["weight_version"])
        for path in sorted(run_dir.glob("samples/step_*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
    ]


def chosen(row: dict[str, Any]) -> dict[str, Any]:
    prefixes = ("time/", "weight_sync/", "memory/", "train/rollout_log_prob_diff", "rollout/")
    return {name: value for name, value in row.items() if name.startswith(prefixes)}


def bandwidth(row: dict[str, Any]) -> float:
    """From the first tensor gathered to the last one loaded."""
    return float(row["weight_sync/bytes"] / row["weight_sync/load_seconds"] / 1e9)


def failures(rows: list[dict[str, Any]], steps: int, found: list[tuple[int, int]]) -> Iterator[str]:
    if len(rows) != steps:
        yield f"{len(rows)} steps of {steps}"
    for number, row in enumerate(rows):
        verified = row.get("weight_sync/verified_tensors", 0)
        unverified = row.get("weight_sync/unverified_tensors", 0)
        if not verified or unverified:
            yield f"step {number}: {verified} tensors verified, {unverified} not"
        difference = row["train/rollout_log_prob_diff_mean"]
        if not difference < MOST_DIFFERENCE:
            yield f"step {number}: engine and trainer differ by {difference}"
    wrong = [pair for pair in found if pair[0] != pair[1]]
    if wrong or not found:
        yield f"{len(wrong)} of {len(found)} responses of another version: {wrong[:3]}"


def awake_less_asleep(used: list[int]) -> float:
    """GiB between the fullest moment and the emptiest one after the first fullest.

    The trainer's own memory is the larger of the two then, so this is less than the server frees.
    """
    if not used:
        return 0.0
    top = max(used)
    # Near the top: the cache is there. The end of the run, when all is freed, does not count.
    awake = [index for index, mib in enumerate(used) if mib > 0.9 * top]
    between = used[awake[0] : awake[-1] + 1]
    return (top - min(between)) / 1024


def total_gib() -> float:
    return float(torch.cuda.get_device_properties(0).total_memory / 2**30)


if __name__ == "__main__":
    sys.exit(main())
