"""The 70B model and its configuration as fixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.hf_bridge import ModelDims, family_for
from tests.unit.planning.seventy import LLAMA_70B, raw_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    return parse_config(raw_config(folder))


@pytest.fixture
def model() -> ModelDims:
    return family_for(LLAMA_70B).dims(LLAMA_70B)
