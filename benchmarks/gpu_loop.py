"""Stage (e) of gpu_day: ten steps of the real program on a random model, with the embedded engine.

    python benchmarks/gpu_loop.py --out OUT/loop.json [--toy]

The model has SmolLM2-135M's layers and a small vocabulary; its tokenizer learns from the problems
made here, sums whose answers a random model hardly ever gives. So nothing is learned; what counts
is that every part runs on the device, how long each takes, and how far the engine's
log-probabilities lie from the trainer's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results_file import ResultsFile, machine

ROOT = Path(__file__).resolve().parents[1]

SMOLLM2 = {
    "hidden-size": 576,
    "layers": 30,
    "heads": 9,
    "kv-heads": 3,
    "head-dim": 64,
    "ffn-size": 1536,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--toy", action="store_true", help="CPU, toy sizes, two steps")
    args = parser.parse_args()
    device = torch.device("cpu" if args.toy else "cuda")
    steps = 2 if args.toy else args.steps
    out = ResultsFile(args.out, {"machine": machine(device)})
    with tempfile.TemporaryDirectory(prefix="gpu_loop_") as name:
        folder = Path(name)
        config = write_inputs(folder, steps, args.toy)
        make_model(out, config, folder / "model", {} if args.toy else SMOLLM2)
        timed(out, "train", ["-m", "megatron_rlsd.train", str(config)])
        rows = step_rows(folder / "run")
        out.add("steps", len(rows))
        out.add("metrics", medians(rows))


def write_inputs(
    folder: Path, steps: int, toy: bool, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Write problems and a configuration, with ``changes`` of its sections; return its path."""
    draw = random.Random(0)
    with (folder / "sums.jsonl").open("w") as file:
        for _ in range(400):
            terms = [draw.randint(1, 99) for _ in range(3)]
            text, total = " + ".join(map(str, terms)), sum(terms)
            problem = {
                "prompt": f"What is {text}?",
                "answer": str(total),
                "reference_solution": f"{terms[0]} + {terms[1]} is {sum(terms[:2])}, and {total}.",
            }
            file.write(json.dumps(problem) + "\n")
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"hf_path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"train": [{"kind": "jsonl", "path": str(folder / "sums.jsonl")}]},
        "rollout": {
            "prompts_per_step": 4 if toy else 16,
            "n_samples_per_prompt": 4 if toy else 8,
            "max_response_tokens": 8 if toy else 32,
            "embedded": {"max_batch_size": 256},
        },
        # The last digit of whatever number comes last: a random model meets it now and then.
        "reward": {"functions": [{"name": f"{folder / 'reward.py'}:share_of_digits"}]},
        "teacher": {"mode": "live"},
        "train": {"steps": steps, "max_tokens_per_microbatch": 512 if toy else 16384},
    }
    (folder / "reward.py").write_text(
        "def share_of_digits(sample):\n"
        "    text = sample.response\n"
        "    return sum(c.isdigit() for c in text) / max(1, len(text))\n"
    )
    for section, values in (changes or {}).items():
        config[section] = config.get(section, {}) | values
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def make_model(out: ResultsFile, config: Path, folder: Path, sizes: Mapping[str, int]) -> None:
    flags = [text for key, size in sizes.items() for text in (f"--{key}", str(size))]
    timed(out, "make_model", ["tools/make_tiny_model.py", str(config), str(folder), *flags])


def step_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of every step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "time/step_s" in row]


def timed(out: ResultsFile, name: str, command: list[str]) -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    out.add(f"{name}_seconds", round(time.perf_counter() - started, 1))


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of every number that all steps after the first have."""
    steps = rows[1:]
    names = set.intersection(*(set(row) for row in steps)) if steps else set()
    numbers = {n: [row[n] for row in steps] for n in sorted(names)}
    return {
        name: statistics.median(values)
        for name, values in numbers.items()
        if all(isinstance(v, int | float) for v in values)
    }


if __name__ == "__main__":
    main()
