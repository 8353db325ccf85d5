"""Weights between a GPU and main memory: page-locked, bit for bit, and without a second copy."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.runtime.host_memory import HostBlock
from megatron_rlsd.teacher import Teacher
from megatron_rlsd.weight_sync.checksums import word_hash_pieces
from megatron_rlsd.weight_sync.flat import FlatWeights

MIB = 2**20


def test_a_block_is_page_locked_as_long_as_it_lives(cuda: torch.device) -> None:
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    block = HostBlock([((3 * MIB,), torch.float32), ((5,), torch.bfloat16)], cuda)
    assert all(tensor.is_pinned() for tensor in block.tensors)
    # torch's own allocator, which rounds to powers of two, has no part in it.
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before
    kept = block.tensors[0]
    kept.copy_(torch.arange(3 * MIB, device=cuda))
    del block
    assert not kept.is_pinned()
    assert torch.equal(kept, torch.arange(3.0 * MIB))
    # The same pages can be locked again.
    for _ in range(3):
        block = HostBlock([((3 * MIB,), torch.float32)], cuda)
        assert block.tensors[0].is_pinned()


def test_buckets_reach_main_memory_bit_for_bit_while_the_gpu_goes_on(cuda: torch.device) -> None:
    weights = FlatWeights(16 * MIB, lambda n: torch.empty(n, dtype=torch.uint8), cuda)
    generator = torch.Generator(cuda).manual_seed(0)
    for _ in range(2):
        tensors = {
            str(i): torch.randn(3 * MIB + i, generator=generator, device=cuda).bfloat16()
            for i in range(40)
        }
        expected = {name: tensor.cpu() for name, tensor in tensors.items()}
        for bucket in weights.refill(iter(tensors.items())):
            for name, tensor in bucket.tensors():
                assert torch.equal(tensor, tensors[name])
            # Its memory goes to other work at once, as after sending.
            bucket.device_flat = None
            torch.full((bucket.nbytes,), 255, dtype=torch.uint8, device=cuda)
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor)
    weights.clear()


def test_hashes_are_those_of_the_cpu_and_take_little_memory(cuda: torch.device) -> None:
    pieces = [torch.randn(n, 4096).bfloat16() for n in (4096, 1024, 1023)]
    expected = word_hash_pieces(pieces)
    there = [piece.to(cuda) for piece in pieces]
    assert word_hash_pieces(there) == expected
    large = torch.randn(2**28, device=cuda).bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    started = time.perf_counter()
    word_hash_pieces([large])
    seconds = time.perf_counter() - started
    extra = torch.cuda.max_memory_allocated() - before
    print(f"\nhash: {large.nbytes / seconds / 1e9:.1f} GB/s, {extra / MIB:.0f} MiB")
    assert extra < 160 * MIB


@pytest.mark.parametrize("mode", ["frozen", "ema"])
def test_a_teacher_takes_one_parameter_more_and_leaves_the_student_bit_for_bit(
    cuda: torch.device, mode: str
) -> None:
    parameters = {
        str(i): torch.nn.Parameter(torch.randn(8 * MIB, device=cuda, dtype=torch.bfloat16))
        for i in range(16)
    }
    teacher = Teacher(TeacherConfig(mode=mode, ema_decay=0.5), parameters)
    first = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(-3)
    student = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with teacher.applied():
        for name, parameter in parameters.items():
            assert torch.equal(parameter, first[name])
    extra = torch.cuda.max_memory_allocated() - before
    for name, parameter in parameters.items():
        assert torch.equal(parameter, student[name])
    # One parameter of 16 MiB (float32: twice that), and what comparing takes.
    assert extra <= 4 * 16 * MIB
