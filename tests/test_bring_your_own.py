"""docs/bring_your_own.md: its examples run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_rlsd import train
from megatron_rlsd.data import build_sources
from megatron_rlsd.observability import read_metrics
from tests.conftest import ROOT


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs/bring_your_own.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_three_steps_on_parquet_in_verls_layout(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[0], {})
    config = make_config(data=yaml.safe_load(blocks("yaml")[0])["data"])
    train.train(config)
    run = Path(config.run_dir)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["teacher/without_hint_share"] == 0 for step in steps)
    samples = [json.loads(line) for line in (run / "samples/step_000001.jsonl").open()]
    assert {sample["source"] for sample in samples} == {"train"}
    for sample in samples:
        twice = int(sample["question"].split()[2]) * 2
        assert sample["answer"] == str(twice)
    (problem,) = build_sources(config.data.train, config.train.seed).next(1)
    assert "is twice" in (problem.reference_solution or "")
