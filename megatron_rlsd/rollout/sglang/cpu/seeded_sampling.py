"""SGLang's seeded sampling (--enable-deterministic-inference) on a machine without a GPU.

SGLang draws a request's token at a position by a hash of seed, position and token id. What it has
for that on a CPU is in the kernel package that this folder only stands in for, so the hash is
computed here; and it asks for matrix products that do not depend on the batch, of which it has
Triton kernels alone. Products on a CPU depend on the batch by rounding: a draw that is decided by
less than that may differ.
"""

from __future__ import annotations

import os

import torch

MASK = 0xFFFFFFFF


def enable() -> None:
    """Call before SGLang starts, in each of its processes."""
    # Or the first token waits for a C++ compiler, and fails where there is none.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.library.define(
        "sgl_kernel::murmur_hash32_cpu",
        "(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor",
    )
    torch.library.impl("sgl_kernel::murmur_hash32_cpu", "CPU", murmur_hash32)

    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (32 bits) of seed, position and column, as SGLang's Triton kernel computes it.

    seed [N] uint64; positions [N] and col_indices [M] integers below 2**32. Returns [N, M] uint32.
    """
    seed = seed.view(torch.int64)
    state = torch.zeros_like(seed)
    for block in (seed & MASK, (seed >> 32) & MASK, positions.long() & MASK):
        state = _mix(state, block)
    state = _mix(state[:, None], col_indices.long()[None, :] & MASK)
    state = state ^ 16  # bytes hashed
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & MASK
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & MASK
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    # Products overflow 64 bits; the lower 32, which are all that is kept, are right all the same.
    block = (block * 0xCC9E2D51) & MASK
    block = (_rotated(block, 15) * 0x1B873593) & MASK
    return (_rotated(state ^ block, 13) * 5 + 0xE6546B64) & MASK


def _rotated(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & MASK
