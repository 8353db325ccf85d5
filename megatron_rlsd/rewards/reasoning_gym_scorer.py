"""The scorer that a reasoning-gym task brings along."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_rlsd.rewards.answers import check_answer_pattern, extract_answer
from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput

# Their scorers compare the board in metadata["output"] with tuples, which JSON made lists.
_TASKS_WITH_TUPLE_BOARDS = ("arc_agi", "rearc")


def _check(pattern: str | None = None) -> None:
    check_answer_pattern(pattern)


@register_reward("reasoning_gym", imports=("reasoning_gym",), check=_check)
def reasoning_gym(sample: RewardInput, pattern: str | None = None) -> float:
    """The task's own score of the extracted answer, in [0, 1]; 0.0 where there is no answer.

    Reads ``problem.metadata["reasoning_gym"] = {"task": name, "params": {...}, "entry": {question,
    answer, metadata}}`` and raises ValueError without it. ``pattern`` as for exact_match.
    """
    origin = sample.problem.metadata.get("reasoning_gym")
    if not isinstance(origin, dict) or not {"task", "entry"} <= origin.keys():
        raise ValueError(
            f"problem {sample.problem.id} has no metadata['reasoning_gym'] with task and entry; "
            "this reward only serves problems of a reasoning_gym source"
        )
    answer = extract_answer(sample.response, pattern)
    if answer is None:
        return 0.0
    task, entry = origin["task"], origin["entry"]
    if task in _TASKS_WITH_TUPLE_BOARDS:
        board = tuple(tuple(row) for row in entry["metadata"]["output"])
        entry = {**entry, "metadata": {**entry["metadata"], "output": board}}
    score = _scorer(task, json.dumps(origin.get("params", {}), sort_keys=True))
    try:
        return float(score(answer=answer, entry=entry))
    except MemoryError:
        raise
    except Exception:
        # Some scorers raise on an answer they cannot read, which is merely a wrong answer. A
        # broken entry is another matter: there the reference answer raises as well.
        score(answer=entry["answer"], entry=entry)
        return 0.0


@cache
def _scorer(task: str, params: str) -> Callable[..., Any]:
    """The scorer of the task at its difficulty, which a few scorers read."""
    from reasoning_gym import create_dataset

    return create_dataset(task, size=1, **json.loads(params)).score_answer
