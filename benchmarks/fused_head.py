"""The fused head beside plain torch and other projects' kernels: time, memory, error, floors.

    python benchmarks/fused_head.py                      # what fits the device, a few minutes
    python benchmarks/fused_head.py --shapes 16384x4096x151936 --shards 1,8 --active 1.0,0.5

Writes NAME.json, NAME.md and NAME.png under benchmarks/results/. Contenders that cannot run are
listed with the reason. A shard of 8 is one rank's work under tensor parallelism 8, without the
communication. Extra memory counts gradients, but not a main_grad that was there before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from head_contenders import CONTENDERS, Contender, Problem, Run, Skip, make_problem
from head_measure import (
    exact_gradients,
    exact_log_probs,
    floors,
    relative_error,
    run_measuring_memory,
    summary,
    take_turns,
)
from head_report import markdown, plot

Shape = tuple[int, int, int]
DEFAULT_SHAPES = {
    "cpu": ["256x512x151936", "512x512x151936", "2048x512x151936"],
    "cuda": ["4096x4096x151936", "16384x4096x151936", "65536x4096x151936"],
}
ALL_SHAPES = [
    f"{N}x{D}x{V}"
    for V in (32000, 128256, 151936)
    for D in (2048, 4096, 8192)
    for N in (4096, 16384, 65536)
]
EXACT_WORK = {"cpu": 1e12, "cuda": 2e13}
"""Products of float64 that the exact gradients may take; errors of larger problems are left out."""


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    shapes = [parse_shape(shape) for shape in args.shapes or DEFAULT_SHAPES[device.type]]
    results: dict[str, Any] = {"machine": machine(device, dtype), "rows": [], "skipped": {}}
    runs = prepare(device, dtype, args.only, results["skipped"])
    largest = max(shapes)
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.out / (args.name or f"fused_head_{device.type}")
    for shape in shapes:
        for shard in args.shards:
            for active in args.active:
                # Shards and inactive rows are shown at the largest shape.
                if shape == largest or (shard, active) == (args.shards[0], args.active[0]):
                    N, D, V = shape
                    case = {"N": N, "D": D, "V": V // shard, "shard": shard, "active": active}
                    print(f"# {case}", flush=True)
                    results["rows"] += measure(case, runs, device, dtype, args)
                    # After every case, so that a run cut short leaves what it had.
                    results["machine"]["load_after"] = os.getloadavg()
                    name.with_suffix(".json").write_text(json.dumps(results, indent=1))
    text = markdown(results)
    name.with_suffix(".md").write_text(text)
    print(text)
    print(plot(results, name.with_suffix(".png")))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", help="NxDxV ..., or 'all'")
    parser.add_argument("--shards", type=ints, default=[1, 8], help="parts of the vocabulary")
    parser.add_argument("--active", type=floats, default=[1.0, 0.5], help="share of rows with A")
    parser.add_argument("--rounds", type=int, default=0, help="timed runs; default 3 on CPU, 30")
    parser.add_argument("--seconds", type=float, default=60, help="of timing per shape")
    parser.add_argument("--inputs", type=int, default=2, help="sets of inputs that rotate")
    parser.add_argument("--only", nargs="+", help="contenders whose name holds one of these")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--name", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    if args.shapes == ["all"]:
        args.shapes = ALL_SHAPES
    args.rounds = args.rounds or (3 if args.device == "cpu" else 30)
    return args


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse_shape(text: str) -> Shape:
    N, D, V = (int(part) for part in text.split("x"))
    return N, D, V


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": os.getloadavg(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def prepare(
    device: torch.device, dtype: torch.dtype, only: list[str] | None, skipped: dict[str, str]
) -> dict[tuple[str, str], tuple[Contender, Run]]:
    ready = {}
    for contender in CONTENDERS:
        if only and not any(part in contender.name for part in only):
            continue
        try:
            ready[contender.task, contender.name] = contender, contender.prepare(device, dtype)
        except (Skip, ImportError) as reason:
            skipped.setdefault(contender.name, str(reason))
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}", flush=True)
    return ready


def measure(
    case: dict[str, Any],
    ready: dict[tuple[str, str], tuple[Contender, Run]],
    device: torch.device,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for every contender and floor of one shape."""
    N, D, V = case["N"], case["D"], case["V"]
    problems = [
        make_problem(N, D, V, case["active"], dtype, device, seed) for seed in range(args.inputs)
    ]
    tiny = make_problem(64, D, min(V, 4096), 1.0, dtype, device, seed=0)
    exact = exact_values(problems[0], device)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = dict(floors(problems[0]))
    for (task, name), (contender, run) in ready.items():
        if not belongs(contender, case["active"]):
            continue
        row = case | {"task": task, "contender": name, "computes": contender.computes}
        rows.append(row)
        try:
            run(tiny)  # libraries, thread pools
            if "compile" in name:
                run(problems[0])  # compiled for the shapes of its inputs
            problems[0].main_grad.zero_()
            result, row["extra_bytes"] = run_measuring_memory(run, problems[0])
            row["errors"] = errors(contender, result, problems[0], exact)
            runs[f"{task}/{name}"] = run
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        for problem in problems:
            problem.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"  {task}/{name} {row.get('failed', '')}", flush=True)
    times = take_turns(runs, problems, args.rounds, args.seconds)
    for name in floors(problems[0]):
        rows.append(case | {"task": "floor", "contender": name, "seconds": summary(times[name])})
    for row in rows:
        if (key := f"{row['task']}/{row['contender']}") in times:
            row["seconds"] = summary(times[key])
    return rows


def belongs(contender: Contender, active: float) -> bool:
    """Rows without an advantage make a difference to ours alone."""
    if active == 1:
        return "A = 0" not in contender.name
    return contender.name.startswith("ours") and contender.task == "loss"


def exact_values(problem: Problem, device: torch.device) -> dict[str, torch.Tensor]:
    exact = {"log_probs": exact_log_probs(problem)}
    if problem.hidden.numel() * len(problem.weight) <= EXACT_WORK[device.type]:
        exact["d_hidden"], exact["d_weight"] = exact_gradients(problem)
    return exact


def errors(
    contender: Contender, result: torch.Tensor, problem: Problem, exact: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Against float64 of the same inputs: largest of log-probabilities, norms of gradients."""
    if contender.task == "log_probs":
        rows = len(exact["log_probs"])
        return {"log_probs": float((result[:rows] - exact["log_probs"]).abs().max())}
    if contender.computes != "RLSD loss" or "responses" in contender.name:
        return {}
    d_weight = problem.main_grad if contender.into_main_grad else problem.weight.grad
    gradients = {"d_hidden": problem.hidden.grad, "d_weight": d_weight}
    return {n: relative_error(g, exact[n]) for n, g in gradients.items() if n in exact}


if __name__ == "__main__":
    main()
