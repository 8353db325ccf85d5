"""Training batches from plain lists, and back."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_rlsd.types import Generation, Problem, TrainBatch, TrainRow, Trajectory


def train_row(
    prompt_ids: ArrayLike,
    response_ids: ArrayLike,
    advantage: float = 1.0,
    *,
    rollout_log_probs: ArrayLike | None = None,
    loss_mask: ArrayLike | None = None,
    teacher_prompt_ids: ArrayLike | None = None,
    contrast_prompts: Sequence[ArrayLike] = (),
    **others: Any,
) -> TrainRow:
    """A row of these numbers; log-probabilities are -1 and every token is trained unless given."""
    count = np.shape(response_ids)[0]

    def ids(prompt: ArrayLike | None) -> np.ndarray | None:
        return None if prompt is None else np.array(prompt, np.int32)

    return TrainRow(
        prompt_ids=np.array(prompt_ids, np.int32),
        response_ids=np.array(response_ids, np.int32),
        loss_mask=np.array([True] * count if loss_mask is None else loss_mask, np.bool_),
        rollout_log_probs=np.array(
            [-1.0] * count if rollout_log_probs is None else rollout_log_probs, np.float32
        ),
        advantage=advantage,
        teacher_prompt_ids=ids(teacher_prompt_ids),
        contrast_prompts=tuple(np.array(each, np.int32) for each in contrast_prompts),
        **others,
    )


def rows_of(batch: TrainBatch) -> list[TrainRow]:
    """All rows of a batch, in their order."""
    return [batch.rows[number] for number in range(len(batch))]


def trajectory(
    problem: Problem,
    generation: Generation,
    response_text: str = "",
    *,
    prompt_ids: ArrayLike = (1,),
    **others: Any,
) -> Trajectory:
    """A trajectory; prompts may be lists."""
    others = {
        name: np.array(value, np.int32) if name.endswith("prompt_ids") else value
        for name, value in others.items()
    }
    return Trajectory(
        problem=problem,
        prompt_ids=np.array(prompt_ids, np.int32),
        generation=generation,
        response_text=response_text,
        **others,
    )


def plain(item: Any) -> SimpleNamespace:
    """An object's fields, arrays as lists, which compare with == and join with +."""
    return SimpleNamespace(**{name: _plain_value(value) for name, value in vars(item).items()})


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [*map(_plain_value, value)]
    return value.tolist() if isinstance(value, np.ndarray) else value


def plain_rows(batch: TrainBatch) -> list[SimpleNamespace]:
    """All rows as lists and numbers."""
    return [plain(row) for row in rows_of(batch)]
