"""What holds for a batch holds whichever way it was collected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.runtime.errors import UserError
from tests.unit.experience.conftest import BATCH, publish

pytestmark = [
    pytest.mark.process,
    pytest.mark.parametrize("staleness", [0, 1], ids=["synchronous", "stream"]),
]


def jsonl(folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """Sections of a run whose questions are these, over and over in their order."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"train": [{"kind": "jsonl", "path": str(path), "shuffle": False}]}}


def test_a_critique_under_another_key_ends_the_run(start, staleness: int, tmp_path: Path) -> None:
    row = {"prompt": "2 + 2", "answer": "4", "metadata": {"remark": "Count to four."}}
    for key in ("critique", "Remark", "remark.text"):
        sections = jsonl(tmp_path, row) | {"teacher": {"hint": "critique", "critique_key": key}}
        with start(staleness, **sections) as (collector, engine):
            publish(collector, engine, 0)
            with pytest.raises(UserError, match=f"none of the first {BATCH} .*'{key}'"):
                collector.collect(0)


def test_one_critique_among_the_first_questions_is_enough(
    start, staleness: int, tmp_path: Path
) -> None:
    row = {"prompt": "2 + 2", "answer": "4"}
    told = row | {"metadata": {"remark": "Count to four."}}
    sections = jsonl(tmp_path, row, told, row)
    sections |= {"teacher": {"hint": "critique", "critique_key": "remark"}}
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        publish(collector, engine, 1)
        collector.collect(1)
    assert metrics["teacher/without_hint_share"] == 0.5
    assert {bool(t.teacher_prompt_ids) for g in groups for t in g.trajectories} == {True, False}


def test_groups_without_signal_make_room_but_not_for_ever(start, staleness: int) -> None:
    """No response is rewarded, so that the filter never finds a group."""
    never = {"functions": [{"name": "exact_match"}], "workers": 1}
    algorithm = {"group_filter": True, "max_refills": 2}
    with start(staleness, reward=never, algorithm=algorithm) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        assert len(groups) == BATCH
        # The stream may have gone on to the groups of the next batch.
        sampled = [3 * BATCH, (2 + 1 + staleness) * BATCH]
        filtered = 2 if staleness else 3
        shares = [filtered * BATCH / count for count in sampled]
        assert min(shares) <= metrics["rollout/group_filter_share"] <= max(shares)


def test_without_the_filter_no_group_is_left_out(start, staleness: int) -> None:
    never = {"functions": [{"name": "exact_match"}], "workers": 1}
    with start(staleness, reward=never) as (collector, engine):
        publish(collector, engine, 0)
        _, metrics = collector.collect(0)
        assert metrics["rollout/group_filter_share"] == 0
        assert metrics["rollout/zero_advantage_share"] == 1


def test_questions_that_do_not_fit_are_left_out_and_counted(
    start, staleness: int, tmp_path: Path
) -> None:
    short, long = ({"prompt": text, "answer": "4"} for text in ("2 + 2", "2 + " * 200 + "2"))
    sections = jsonl(tmp_path, long, short, short, long) | {"prompts": {"max_prompt_tokens": 100}}
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        assert metrics["rollout/prompts_too_long"] >= 1
        assert {g.problem.messages[-1]["content"] for g in groups} == {"2 + 2"}
    sections |= jsonl(tmp_path, long)
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        with pytest.raises(UserError, match="max_prompt_tokens=100"):
            collector.collect(0)


def test_a_conversation_to_imitate_is_refused(start, staleness: int, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    row = {"messages": turns, "answer": "4"}
    with start(staleness, **jsonl(tmp_path, row)) as (collector, engine):
        publish(collector, engine, 0)
        with pytest.raises(UserError, match="a conversation to imitate"):
            collector.collect(0)
