"""Batches of steps that were recorded before columns had their present names."""

from __future__ import annotations

from megatron_rlsd.parallel.exchange import train_batch_of, train_batch_tensors
from megatron_rlsd.types import TrainBatch


def test_a_batch_recorded_by_release_0_1_is_read() -> None:
    batch = TrainBatch(
        prompt_ids=[[1, 2], [3]],
        teacher_prompt_ids=[[], [4, 5]],
        response_ids=[[6, 7, 8], [9]],
        rollout_log_probs=[[-0.5, 0.0, -1.5], [-2.0]],
        advantages=[1.0, -1.0],
        loss_masks=[[1, 0, 1], [1]],
    )
    tensors = train_batch_tensors(batch)
    old = {name.replace("loss_masks", "response_masks"): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    assert train_batch_of(old) == train_batch_of(tensors) == batch
