"""The example configuration of every algorithm, made small enough for a test."""

from __future__ import annotations

from pathlib import Path

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.config.variants import VARIANTS

CONFIGS = Path(__file__).parent.parent / "examples/configs/algorithms"
NAMES = tuple(VARIANTS)


def small_config(name: str, run_dir: Path, model: Path, teacher: Path, *overrides: str) -> Config:
    """examples/configs/algorithms/``name``.yaml with these models, and the reward of conftest.py,
    which varies for random models; it lies beside the model.
    """
    changes = [
        f"run_dir={run_dir}",
        f"model.hf_path={model}",
        "rollout.max_response_tokens=10",
        f"reward.functions=[{{name: '{model.parent}/even_digits.py:even_digits'}}]",
        "reward.solved_threshold=0.5",
        "reward.workers=1",
        "train.max_tokens_per_microbatch=512",
        "observability.tensorboard=false",
        "observability.progress=none",
        "distributed.timeout_seconds=60",
    ]
    if name == "opd":
        changes.append(f"teacher.hf_path={teacher}")
    if name == "rlcsd":
        changes.append("eval.answer_pattern='([a-z])'")  # what a random model writes
    return load_config(CONFIGS / f"{name}.yaml", [*changes, *overrides])
