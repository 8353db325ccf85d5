"""Tensors in one block of main memory: where they lie, and when its pages are locked."""

from __future__ import annotations

import gc

import torch

from megatron_rlsd.runtime.host_memory import ALIGNMENT, HostBlock

KINDS = [((3, 5), torch.float32), ((), torch.float32), ((7,), torch.bfloat16), ((0, 4), torch.int8)]
CPU = torch.device("cpu")


def test_tensors_lie_in_one_buffer_that_is_hardly_larger_than_they_are() -> None:
    block = HostBlock(KINDS, CPU)
    assert [(tuple(t.shape), t.dtype) for t in block.tensors] == KINDS
    # torch's pinned allocator would take a power of two for each.
    assert block.buffer.nbytes == 3 * ALIGNMENT
    first = block.buffer.data_ptr()
    for number, tensor in enumerate(block.tensors):
        tensor.fill_(number)
        if tensor.numel():
            assert first <= tensor.data_ptr() < first + block.buffer.nbytes
            assert (tensor.data_ptr() - first) % ALIGNMENT == 0
        # Of a larger storage Megatron's checkpoint writer would copy it first.
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert [t.unique().tolist() for t in block.tensors] == [[0], [1], [2], []]
    large = HostBlock([((2**20 + 1,), torch.float32)] * 3, CPU)
    assert large.buffer.nbytes < 1.001 * 3 * 4 * 2**20


def test_its_pages_are_locked_once_and_unlocked_before_they_are_freed() -> None:
    done: list[tuple[str, int]] = []

    def lock(buffer: torch.Tensor):
        done.append(("lock", buffer.nbytes))
        # As lock_pages: what unlocks holds the buffer.
        return lambda: done.append(("unlock", int(buffer[0])))

    block = HostBlock(KINDS, CPU, lock)
    assert done == [("lock", block.buffer.nbytes)]
    kept = block.tensors[0].fill_(1.0)
    block.buffer[0] = 17
    del block
    gc.collect()
    assert done[1:] == [("unlock", 17)]
    kept.fill_(2.0)
    assert kept.sum() == 30
    assert HostBlock([], CPU, lock).tensors == []
    assert len(done) == 2
