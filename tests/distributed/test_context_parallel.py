"""Attention over sequences that ranks share equals attention over whole sequences."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.actor.context_parallel import gather_pack, held_positions
from megatron_rlsd.actor.layers import PackedAttention
from megatron_rlsd.actor.packing import PackBounds
from tests.distributed.ranks import run_on_ranks

# Megatron comes after the package that prepares it for this machine.
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

BOUNDS = [0, 6, 30, 36, 54]
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 6, 2, 5, 4
SCALE = 0.3


def expected_attention(query, key, value):
    """Plain softmax over whole sequences, one query head at a time."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for start, end in pairwise(BOUNDS):
        mask = torch.ones(end - start, end - start).tril() == 0
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            scores = query[start:end, head] @ key[start:end, group].T * SCALE
            weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
            out[start:end, head] = weights @ value[start:end, group]
    return out


def inputs():
    torch.manual_seed(5)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM)]
    tensors = [torch.randn(BOUNDS[-1], *shape, dtype=torch.float64) for shape in shapes]
    d_out = torch.randn(BOUNDS[-1], HEADS, VALUE_DIM, dtype=torch.float64)
    return [t.requires_grad_() for t in tensors], d_out


def compare(cp_group):
    """On each rank: its rows of output and gradients against those of the whole."""
    whole, d_out = inputs()
    expected = expected_attention(*whole)
    d_whole = torch.autograd.grad(expected, whole, d_out)

    rank, size = (cp_group.rank(), cp_group.size()) if cp_group else (0, 1)
    rows = held_positions(BOUNDS, rank, size)
    mine = [t.detach()[rows].requires_grad_() for t in whole]
    config = TransformerConfig(num_layers=1, hidden_size=30, num_attention_heads=HEADS)
    groups = SimpleNamespace(cp=cp_group) if cp_group else None
    attention = PackedAttention(config, 1, softmax_scale=SCALE, pg_collection=groups)
    params = PackBounds(qkv_format="thd", bounds=list(BOUNDS))
    out = attention(*mine, packed_seq_params=params)
    assert torch.allclose(out, expected[rows], atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(out, mine, d_out[rows]), d_whole, strict=True):
        assert torch.allclose(got, wanted[rows], atol=1e-12)
    if cp_group:
        assert torch.equal(gather_pack(mine[1], BOUNDS, cp_group), whole[1])
        with pytest.raises(ValueError, match="a sequence of 7 tokens has no 6 equal chunks"):
            held_positions([0, 7], rank, size)


def on_ranks():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    compare(dist.group.WORLD)
    dist.destroy_process_group()


def test_one_rank_equals_plain_softmax():
    compare(None)


def test_three_ranks_equal_plain_softmax():
    run_on_ranks(on_ranks, 3, seconds=120)
