"""Batches as named tensors, and those of steps that release 0.1 recorded."""

from __future__ import annotations

import numpy as np
import torch

from megatron_rlsd.parallel.train_batches import train_batch_of, train_batch_tensors
from megatron_rlsd.types import TrainBatch
from tests.batches import plain_rows, rows_of, train_row

ROWS = [
    train_row([1, 2], [6, 7, 8], 1.5, loss_mask=[1, 0, 1], rollout_log_probs=[-0.5, 0, -1.5]),
    train_row([3], [9], -1.0, teacher_prompt_ids=[4, 5], evidence_span=(0, 0), solved=False),
    train_row([3], [2, 2], 0.0, contrast_prompts=[[9, 9], [8]], evidence_span=(1, 2), solved=True),
    train_row([3], [2], 0.5, solved=True, group_solved_share=1 / 3),
    train_row([3], [2], 0.5, episode=0),
    train_row([4], [2], 0.5, episode=0),
    train_row([3], [2, 5], 0.5, token_advantages=np.array([0.25, -1], np.float32)),
    train_row([3], [2, 2], weight_versions=np.array([0, 1], np.int32)),
]


def with_routes() -> list:
    routes = torch.arange(2 * 3 * 2, dtype=torch.int16).view(2, 3, 2)
    return [*ROWS, train_row([3], [2, 2], routed_experts=routes)]


def test_what_is_sent_arrives_and_what_is_missing_stays_missing() -> None:
    for rows in (ROWS, with_routes(), ROWS[:1], []):
        batch = TrainBatch.of(rows)
        arrived = train_batch_of(train_batch_tensors(batch))
        assert arrived.outlines == batch.outlines
        for before, after in zip(plain_rows(batch), plain_rows(arrived), strict=True):
            one, other = (vars(row).pop("routed_experts") for row in (before, after))
            assert before == after
            assert (one is None and other is None) or torch.equal(one, other)
        for row in rows_of(arrived):
            assert row.response_ids.dtype == "int32"
            assert row.rollout_log_probs.dtype == "float32"
            assert row.loss_mask.dtype == "bool"


def old_ragged(name: str, rows: list, dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lengths": torch.tensor([len(row) for row in rows], dtype=torch.int64),
        f"{name}.values": torch.tensor([v for row in rows for v in row], dtype=dtype),
    }


def test_batches_recorded_by_release_0_1_are_read() -> None:
    """Every column was there; an empty one meant that nothing was masked, or that no hint was."""
    for masks in ("loss_masks", "response_masks"):
        for masked in (True, False):
            batch = train_batch_of(
                old_ragged("prompt_ids", [[1, 2], [3]])
                | old_ragged("teacher_prompt_ids", [[], [4, 5]])
                | old_ragged("response_ids", [[6, 7, 8], [9]])
                | old_ragged("rollout_log_probs", [[-0.5, 0.0, -1.5], [-2.0]], torch.float32)
                | {"advantages": torch.tensor([1.0, -1.0], dtype=torch.float64)}
                | old_ragged("contrast_prompt_ids", [])
                | old_ragged("evidence_spans", [[0, 2], [1, 1]] if masked else [])
                | old_ragged(masks, [[1, 0, 1], [1]] if masked else [])
            )
            first, second = plain_rows(batch)
            assert first.loss_mask == ([True, False, True] if masked else [True] * 3)
            assert (first.teacher_prompt_ids, second.teacher_prompt_ids) == (None, [4, 5])
            assert (first.evidence_span, second.evidence_span) == (
                ([0, 2], [1, 1]) if masked else (None, None)
            )
            assert first.contrast_prompts == []
            assert batch.outlines[0].trained_tokens == (2 if masked else 3)
            train_batch_tensors(batch)
