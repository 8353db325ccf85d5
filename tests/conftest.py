"""What tests of the whole program share: a tiny model folder and a configuration that uses it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_rlsd.algorithms import registry
from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.config.variants import VARIANTS
from megatron_rlsd.data.worked_solutions import WRITERS
from megatron_rlsd.environments.registry import ENVIRONMENTS
from megatron_rlsd.hf_bridge import FAMILIES
from megatron_rlsd.plugins import FILE_MODULE
from megatron_rlsd.rewards.registry import REWARDS
from tests.tiers import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    starts_a_process_only_if_marked,
    watch_processes,
)
from tests.triton_interpreter import triton_interpreter

watch_processes()

if find_spec("triton") is not None and not torch.cuda.is_available():
    # Before any test imports triton, which many libraries do.
    with triton_interpreter():
        pass

# Several threads a process only get in each other's way: the tests' tensors are small.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
EVEN_DIGITS = '''
def even_digits(sample):
    """A reward that a random model already varies in."""
    digits = [c for c in sample.response if c.isdigit()]
    return sum(c in "02468" for c in digits) / max(1, len(digits))
'''


@pytest.fixture(autouse=True)
def what_a_test_registers_goes_with_it() -> Iterator[None]:
    """Restore the tables of plug-ins, so that no test depends on which ran before it."""
    tables: tuple[dict[str, Any], ...] = (VARIANTS, registry._OWN, REWARDS, ENVIRONMENTS, WRITERS)
    before, families = [set(table) for table in tables], list(FAMILIES)
    yield
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            del table[name]
    FAMILIES[:] = families
    for name in [name for name in sys.modules if name.startswith(FILE_MODULE)]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 folder with its own tokenizer, made by the tool that the demo uses."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw_config(folder / "model", folder)))
    sizes = [
        "--vocab-size=320",
        "--hidden-size=32",
        "--layers=4",
        "--ffn-size=64",
        "--head-dim=16",
        "--problems=200",
    ]
    command = [sys.executable, ROOT / "tools/make_tiny_model.py", config, folder / "model", *sizes]
    subprocess.run(list(map(str, command)), check=True, timeout=120, capture_output=True)
    return folder / "model"


@pytest.fixture
def make_config(tiny_model: Path, tmp_path: Path) -> Callable[..., Config]:
    """Build a valid configuration; keyword arguments replace keys of its sections."""

    def make(**sections: dict[str, Any]) -> Config:
        raw = raw_config(tiny_model, tmp_path)
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
        return parse_config(raw)

    return make


def raw_config(model: Path, folder: Path) -> dict[str, Any]:
    reward = folder / "even_digits.py"
    reward.write_text(EVEN_DIGITS)
    source = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "size": 1000,
        "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    }
    return {
        "run_dir": str(folder / "run"),
        "model": {"hf_path": str(model), "dtype": "float32"},
        "data": {"train": [{**source, "seed": 1}], "eval": [{**source, "seed": 2}]},
        "prompts": {
            "format_instruction": "End with #### and the answer.",
            "sft_response": "{reference_solution}\n#### {answer}",
        },
        "rollout": {"prompts_per_step": 3, "n_samples_per_prompt": 4, "max_response_tokens": 12},
        "reward": {"functions": [{"name": f"{reward}:even_digits"}], "workers": 1},
        "algorithm": {"rlsd_lambda": 0.5},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 3, "max_tokens_per_microbatch": 256},
        "eval": {"num_problems": 4, "n_samples": 2, "pass_at_k": [1, 2]},
        "observability": {"tensorboard": False, "progress": "none"},
        "distributed": {"timeout_seconds": 60},
    }
