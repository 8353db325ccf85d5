"""run_dir/samples: what the model wrote, with what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlsd.observability.metrics_file import finite_or_none
from megatron_rlsd.types import Group, Trajectory


def write_samples(folder: Path, step: int, groups: list[Group]) -> Path:
    """One line per trajectory to ``folder``/step_000012.jsonl, in the order of the groups."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    rows = [sample_row(t) for group in groups for t in group.trajectories]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sample_row(trajectory: Trajectory) -> dict[str, Any]:
    problem, generation, reward = trajectory.problem, trajectory.generation, trajectory.reward
    return {
        "problem_id": problem.id,
        "source": problem.source,
        "question": problem.messages[-1]["content"],
        "answer": problem.answer,
        "response": trajectory.response_text,
        "reward": None if reward is None else finite_or_none(reward.value),
        "reward_parts": {} if reward is None else reward.parts,
        "reward_errors": {} if reward is None else reward.errors,
        "advantage": finite_or_none(trajectory.advantage),
        "finish_reason": generation.finish_reason,
        "tokens": len(generation.token_ids),
        "weight_version": generation.weight_version,
    }


def drop_samples_from(folder: Path, step: int) -> None:
    """Remove the files of ``step`` and later, which a resumed run writes again."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) >= step:
            path.unlink()
