"""The sample dump of every layout holds the credit that one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import parse_config
from megatron_rlsd.observability.samples import read_samples
from megatron_rlsd.observability.trace import read_trace
from megatron_rlsd.train import train
from tests.distributed.ranks import next_world, run_on_ranks

SCORED = ("log_probs", "teacher_log_probs", "gain", "evidence_weight", "advantages", "entropy")
LAYOUTS = {
    "tensor": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "data": {},
    "context": {"context": 2},
}


def train_all(raws: list[dict[str, Any]]) -> None:
    for number, raw in enumerate(raws):
        if number:
            next_world()
        train(parse_config(raw))


def test_the_dump_does_not_depend_on_the_layout(make_config, tmp_path: Path) -> None:
    def raw(name: str, layout: dict[str, Any]) -> dict[str, Any]:
        config = make_config(
            run_dir=str(tmp_path / name),
            parallel=layout,
            # Two updates a rollout, several micro-batches each; all groups but one are dumped.
            train={"steps": 1, "global_batch_size": 6, "max_tokens_per_microbatch": 128},
            data={"eval": []},
            observability={"samples_per_step": 2, "trace": True},
        )
        return config.model_dump(mode="json")

    def dump(name: str) -> list[dict[str, Any]]:
        return read_samples(tmp_path / name / "samples" / "step_000000.jsonl")

    train(parse_config(raw("one", {})))
    expected = dump("one")
    assert len(expected) == 8
    scored = [row for row in expected if row["advantage"]]
    assert len(scored) >= 4
    for row in expected:
        columns = row["token_columns"]
        assert "".join(columns["text"]) == row["response"]
        assert ("gain" in columns) == (row["advantage"] != 0)
    for row in scored:
        columns = row["token_columns"]
        for student, teacher, gain in zip(
            columns["log_probs"], columns["teacher_log_probs"], columns["gain"], strict=True
        ):
            assert gain == pytest.approx(teacher - student, abs=2e-3)
        assert any(abs(gain) > 1e-3 for gain in columns["gain"])
    raws = [raw(name, layout) for name, layout in LAYOUTS.items()]
    run_on_ranks(train_all, 2, raws, seconds=500, worlds=len(raws))
    for name in LAYOUTS:
        measured = dump(name)
        for one, other in zip(expected, measured, strict=True):
            assert one["response"] == other["response"]
            assert one["token_columns"].keys() == other["token_columns"].keys()
            for column in set(SCORED) & one["token_columns"].keys():
                assert other["token_columns"][column] == pytest.approx(
                    one["token_columns"][column], rel=2e-3, abs=2e-4
                ), (name, column)
        events = [e for e in read_trace(tmp_path / name / "trace/trace.json") if e["ph"] == "X"]
        assert {e["pid"] for e in events if e["name"] == "update"} == {0, 1}, name
