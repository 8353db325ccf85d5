"""Groups that are given out as they come are those of the batch."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.types import Group
from tests.unit.experience.conftest import publish, questions

pytestmark = pytest.mark.process
JUDGE = """
def judge(sample):
    if int(sample.problem.answer) % 3 == 0:
        raise ValueError("not this one")
    return float(len(sample.response) % 2)
"""


def taken_apart(batch: Generator[list[Group], None, Any]) -> tuple[list[Group], Any]:
    parts = []
    while True:
        try:
            parts += next(batch)
        except StopIteration as end:
            return parts, end.value


def numbers(groups: list[Group]) -> list[list[Any]]:
    return [
        [t.generation.token_ids.tolist(), t.advantage, t.teacher_prompt_ids.tolist()]
        for group in groups
        for t in group.trajectories
        if t.teacher_prompt_ids is not None
    ]


def test_a_batch_is_the_same_whatever_comes_first(start, tmp_path: Path) -> None:
    """One question of each draw has no verdict; it is asked for others, and fills up in the end."""
    (tmp_path / "judges.py").write_text(JUDGE)
    reward = {
        "functions": [{"name": f"{tmp_path}/judges.py:judge"}],
        "workers": 1,
        "max_error_share": 1.0,
    }
    sections = {"reward": reward, "algorithm": {"max_refills": 1}}
    sections |= {"rollout": {"prompts_per_step": 3, "n_samples_per_prompt": 2}}
    found = []
    for beside in (False, True):
        with start(0, **sections) as (collector, engine):
            publish(collector, engine, 0)
            for step in range(2):
                if beside:
                    parts, (groups, metrics) = taken_apart(collector.arriving(step))
                    assert sorted(map(id, parts)) == sorted(map(id, groups))
                    assert all(t.reward is not None for g in parts for t in g.trajectories)
                else:
                    groups, metrics = collector.collect(step)
                found.append((questions(groups), numbers(groups), metrics, collector.state()))
    assert found[2:] == found[:2]
    assert any(metrics["rollout/group_filter_share"] > 0 for _, _, metrics, _ in found)


def test_lost_servers_end_the_loop_in_its_middle(start) -> None:
    with start(0) as (collector, engine):
        publish(collector, engine, 0)
        engine.fail_after = 2
        batch = collector.arriving(0)
        with pytest.raises(EngineError, match="no rollout server is left"):
            taken_apart(batch)
