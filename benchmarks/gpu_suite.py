"""Everything that wants a GPU, in one command and under eight minutes: tests/gpu, then benchmarks.

    python benchmarks/gpu_suite.py [--out FOLDER] [--minutes 7.5]

Needs torch and, for each part, what that part names; a part that cannot run says why. Megatron-Core
is not needed. Ends with status 1 if a part that ran has failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    needs: tuple[str, ...]
    share: float
    """Of the time that is left, at most."""


def parts(out: Path) -> list[Part]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-s", "-rs", "-p", "no:cacheprovider"]
    # Neither the project's pytest settings nor its other conftest: they need more packages.
    alone = ["-c", os.devnull, f"--rootdir={ROOT}", "--confcutdir=tests/gpu"]
    benchmark = [python, "benchmarks/fused_head.py", "--device", "cuda", "--out", str(out)]
    headline = ["--shapes", "16384x4096x151936", "--seconds", "40", "--rounds", "20"]
    longer = ["--shapes", "4096x4096x151936", "65536x4096x151936", "--shards", "1"]
    return [
        Part("tests/gpu", [*pytest, *alone, "tests/gpu"], ("pytest",), 0.5),
        Part("headline", [*benchmark, *headline, "--name", "fused_head_h100"], (), 0.6),
        Part(
            "lengths",
            [*benchmark, *longer, "--active", "1.0", "--rounds", "5", "--name", "lengths"],
            (),
            1.0,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=7.5)
    args = parser.parse_args()
    reason = no_device()
    if reason is not None:
        print(f"nothing to run: {reason}")
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    failed = []
    for part in parts(args.out.resolve()):
        missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
        left = deadline - time.monotonic()
        if missing or left < 10:
            print(
                f"== {part.name}: skipped, " + (f"needs {missing}" if missing else "no time left")
            )
            continue
        print(f"== {part.name}: at most {part.share * left:.0f} s", flush=True)
        started = time.monotonic()
        try:
            status = subprocess.run(
                part.command, cwd=ROOT, env=environment, timeout=part.share * left
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        print(f"== {part.name}: status {status}, {time.monotonic() - started:.0f} s", flush=True)
        if status:
            failed.append(part.name)
    print("failed: " + ", ".join(failed) if failed else "all parts that ran passed")
    return 1 if failed else 0


def no_device() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


if __name__ == "__main__":
    sys.exit(main())
