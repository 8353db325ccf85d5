"""The hash that seeded sampling draws by, against MurmurHash3 written down byte by byte."""

from __future__ import annotations

import struct

import torch

from tests.scripts import load_script

SEEDS = [0, 1, 2**63 - 5, 2**32 + 7, 123_456_789_012_345]
POSITIONS = [0, 5, 77, 2**20, 3]


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole 4-byte blocks."""
    state = 0
    for (block,) in struct.iter_unpack("<I", data):
        block = block * 0xCC9E2D51 & 0xFFFFFFFF
        block = ((block << 15) | (block >> 17)) & 0xFFFFFFFF
        state ^= block * 0x1B873593 & 0xFFFFFFFF
        state = ((state << 13) | (state >> 19)) & 0xFFFFFFFF
        state = (state * 5 + 0xE6546B64) & 0xFFFFFFFF
    state ^= len(data)
    state = (state ^ (state >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ (state >> 16)


def test_the_hash_is_murmurs_of_seed_position_and_column() -> None:
    assert murmur3(b"test") == 0xBA6BD213  # the published value
    # As SGLang's environment loads it: by path, for the trainer's has no use for it.
    module = load_script("megatron_rlsd/rollout/sglang/cpu/seeded_sampling.py")
    hashed = module.murmur_hash32(
        torch.tensor(SEEDS).to(torch.uint64), torch.tensor(POSITIONS), torch.arange(257)
    )
    assert hashed.dtype == torch.uint32
    expected = [
        [murmur3(struct.pack("<QII", seed, position, column)) for column in range(257)]
        for seed, position in zip(SEEDS, POSITIONS, strict=True)
    ]
    assert hashed.tolist() == expected
