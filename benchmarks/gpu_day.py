"""What a quarter of an hour on one GPU should tell, in order of worth; each stage has a limit.

    python benchmarks/gpu_day.py --out OUT [--stages head actor loop] [--limit head=110 ...]

Stages, each a program that writes its figures as it goes, so that one which is cut short leaves
what it had:

    head       the fused head, whole and in pieces, beside bare products
    actor      a step on a few layers of an 8B model's widths, Megatron's local layers
    engine     the same on Transformer Engine's layers, in bfloat16
    fp8        the same with FP8 by blocks
    loop       ten steps of the real program on a random model of 135M parameters
    served     five steps in turns with an SGLang server on the same GPU (SGLANG_PYTHON)
    tests      tests/gpu, in parallel workers: compiling is what takes their time
    memory     those of them that measure or fill the memory, one by one
    peers      other projects' heads beside ours, in turns
    lengths    few and many rows

One card shows nothing of NCCL between GPUs or of tensor and pipeline parallelism. ``--toy`` runs
every stage on the CPU at toy sizes. The exit status is 1 if a stage failed or was cut short.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "16384x4096x151936"
PEERS = ("ours", "full logits", "linear_cross", "Liger", "verl", "cut-cross", "TRL", "QuACK")


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    seconds: int
    """Limit; none of the stage is left running after it."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    variable: str | None = None
    """Environment variable that names a program without which it is skipped."""


def stages(out: Path, toy: bool) -> list[Stage]:
    """All stages, in order; with ``toy`` those that a CPU can take, at toy sizes."""
    small = ["--toy"] if toy else []

    def program(name: str, *arguments: str) -> list[str]:
        return [sys.executable, f"benchmarks/{name}.py", *arguments]

    def written(name: str) -> list[str]:
        return ["--out", str(out / f"{name}.json")]

    actor = ("megatron", "pydantic")
    engine = (*actor, "transformer_engine")
    workers = ("pytest", "xdist")
    heads = ["--device", "cpu" if toy else "cuda", "--out", str(out), "--inputs", "1"]
    shapes = ["64x32x300"] if toy else [SHAPE]
    lengths = ["32x32x300", "96x32x300"] if toy else ["4096x4096x151936", "65536x4096x151936"]
    once = ["--shards", "1", "--active", "1.0", "--rounds", "6", "--seconds", "15"]
    found = [
        Stage("head", program("gpu_head", *written("head"), *small), 120),
        Stage(
            "actor",
            program(
                "gpu_actor", *written("actor"), "--profile", str(out / "actor_kernels.txt"), *small
            ),
            90,
            actor,
        ),
        Stage(
            "engine",
            program(
                "gpu_actor",
                *written("engine"),
                *("--layers-of", "transformer_engine"),
                *("--profile", str(out / "engine_kernels.txt")),
                *small,
            ),
            90,
            engine,
        ),
        Stage(
            "fp8",
            program(
                "gpu_actor",
                *written("fp8"),
                *("--layers-of", "transformer_engine", "--fp8", "blockwise", "--no-reference"),
                *small,
            ),
            60,
            engine,
        ),
        Stage("loop", program("gpu_loop", *written("loop"), *small), 120, actor),
        Stage(
            "served",
            program("gpu_served", *written("served"), *small),
            600 if toy else 150,
            actor,
            "SGLANG_PYTHON",
        ),
        Stage("tests", tests(out / "tests.xml", "-n", "6", "-m", "not whole_gpu"), 150, workers),
        Stage("memory", tests(out / "memory.xml", "-m", "whole_gpu"), 90, ("pytest",)),
        Stage(
            "peers",
            program(
                "fused_head",
                *heads,
                *once,
                *("--name", "peers", "--only", *PEERS, "--shapes"),
                *shapes,
            ),
            120,
        ),
        Stage(
            "lengths",
            program(
                "fused_head",
                *heads,
                *once,
                "--only",
                "ours",
                "--shapes",
                *lengths,
                "--name",
                "lengths",
            ),
            60,
        ),
    ]
    if toy:
        # Transformer Engine has no kernels for a CPU, and tests/gpu skips there.
        found = [s for s in found if s.name not in ("engine", "fp8", "tests", "memory")]
    return found


def tests(report: Path, *chosen: str) -> list[str]:
    """tests/gpu with neither the project's pytest settings nor its other conftest, which need more
    packages than a bare machine has."""
    alone = ["-c", os.devnull, f"--rootdir={ROOT}", "--confcutdir=tests/gpu"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-rsP", "-p", "no:cacheprovider"]
    return [*pytest, *alone, f"--junitxml={report}", "-W", "ignore", *chosen, "tests/gpu"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--stages", nargs="+", help="these alone, in their usual order")
    parser.add_argument("--limit", nargs="+", default=[], help="STAGE=SECONDS ...")
    parser.add_argument("--toy", action="store_true", help="CPU, toy sizes")
    args = parser.parse_args()
    if not args.toy and (reason := no_device()) is not None:
        print(f"nothing to run: {reason}")
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = {stage.name: stage for stage in stages(out, args.toy)}
    for text in args.limit:
        name, _, number = text.partition("=")
        if name not in chosen or not number.isdigit():
            parser.error(f"--limit {text}: expected STAGE=SECONDS, stages: {', '.join(chosen)}")
        chosen[name] = replace(chosen[name], seconds=int(number))
    if unknown := set(args.stages or ()) - set(chosen):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are: {', '.join(chosen)}")
    failed = [
        stage.name
        for stage in chosen.values()
        if (args.stages is None or stage.name in args.stages) and not run(stage)
    ]
    print("failed: " + ", ".join(failed) if failed else "all stages that ran passed")
    return 1 if failed else 0


def run(stage: Stage) -> bool:
    """Whether the stage ended well; one that lacks a module is skipped and counts as well."""
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if stage.variable and not Path(os.environ.get(stage.variable, "")).is_file():
        missing.append(f"a program at ${stage.variable}")
    if missing:
        print(f"== {stage.name}: skipped, needs {', '.join(missing)}", flush=True)
        return True
    print(f"== {stage.name}: at most {stage.seconds} s", flush=True)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        # On SIGABRT every thread then says where it is.
        "PYTHONFAULTHANDLER": "1",
    }
    started = time.monotonic()
    # A session of its own, so that workers end with it.
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status = 124
    print(f"== {stage.name}: status {status}, {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


def no_device() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


if __name__ == "__main__":
    sys.exit(main())
