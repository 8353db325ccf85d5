"""Mapping kinds against row-by-row constructions, and how much of a tensor a rank reads."""

from __future__ import annotations

import pytest
import torch

from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.mappings import (
    ColumnParallel,
    FusedGateUp,
    FusedQKV,
    Mapping,
    Replicated,
    RowParallel,
    VocabParallel,
)
from megatron_rlsd.runtime.errors import UserError

TP_SIZES = (1, 3)
DIMS = ModelDims(
    num_layers=2,
    hidden_size=7,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=5,
    ffn_hidden_size=9,
    vocab_size=13,
    padded_vocab_size=15,
    tied_embeddings=False,
)
MAPPINGS: dict[str, Mapping] = {
    "replicated": Replicated("hidden_size"),
    "column": ColumnParallel("ffn_hidden_size", "hidden_size"),
    "column_bias": ColumnParallel("ffn_hidden_size"),
    "row": RowParallel("hidden_size", "attention_size"),
    "vocab": VocabParallel("hidden_size"),
    "qkv": FusedQKV("hidden_size"),
    "qkv_bias": FusedQKV(),
    "gate_up": FusedGateUp("ffn_hidden_size", "hidden_size"),
}


class CountingTensors:
    """Full tensors behind the reading interface, counting the elements that were read."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.elements_read = 0

    def readers(self) -> list:
        def reader(tensor: torch.Tensor):
            def read(ranges):
                part = tensor[tuple(slice(*pair) for pair in ranges)]
                self.elements_read += part.numel()
                return part

            return read

        return [reader(tensor) for tensor in self.tensors]


def random_tensors(mapping: Mapping, dims: ModelDims = DIMS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in mapping.hf_shapes(dims)]


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("kind", MAPPINGS)
def test_merging_the_shards_gives_back_the_tensors(kind: str, tp_size: int) -> None:
    mapping = MAPPINGS[kind]
    tensors = random_tensors(mapping)
    source = CountingTensors(tensors)
    shards = [mapping.shard(source.readers(), DIMS, rank, tp_size) for rank in range(tp_size)]
    for shard in shards:
        assert tuple(shard.shape) == mapping.shard_shape(DIMS, tp_size)
    for merged, tensor in zip(mapping.merge(shards, DIMS), tensors, strict=True):
        assert torch.equal(merged, tensor)


@pytest.mark.parametrize("kind", [kind for kind in MAPPINGS if kind != "replicated"])
def test_ranks_together_read_every_element_once(kind: str) -> None:
    tensors = random_tensors(MAPPINGS[kind])
    source = CountingTensors(tensors)
    for rank in range(3):
        MAPPINGS[kind].shard(source.readers(), DIMS, rank, 3)
    assert source.elements_read == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("kind", ["qkv", "qkv_bias"])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_qkv_rows_are_interleaved_by_query_group(kind: str, tp_size: int) -> None:
    q, k, v = tensors = random_tensors(MAPPINGS[kind])
    rows = []
    for group in range(6):
        for head in (2 * group, 2 * group + 1):
            rows += [q[head * 5 + channel] for channel in range(5)]
        rows += [k[group * 5 + channel] for channel in range(5)]
        rows += [v[group * 5 + channel] for channel in range(5)]
    expected = torch.stack(rows).chunk(tp_size)
    for rank in range(tp_size):
        readers = CountingTensors(tensors).readers()
        assert torch.equal(MAPPINGS[kind].shard(readers, DIMS, rank, tp_size), expected[rank])


def test_a_rank_holds_its_gate_rows_then_its_up_rows() -> None:
    gate, up = tensors = random_tensors(MAPPINGS["gate_up"])
    shard = MAPPINGS["gate_up"].shard(CountingTensors(tensors).readers(), DIMS, 1, 3)
    assert torch.equal(shard, torch.cat([gate[3:6], up[3:6]]))


def test_vocabulary_padding_is_zero_even_where_a_rank_holds_nothing_else() -> None:
    dims = ModelDims(**{**DIMS.__dict__, "vocab_size": 3, "padded_vocab_size": 8})
    mapping = VocabParallel("hidden_size")
    (table,) = tensors = random_tensors(mapping, dims)
    shards = [mapping.shard(CountingTensors(tensors).readers(), dims, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(shards)[:3], table)
    assert torch.cat(shards)[3:].eq(0).all()
    assert [tuple(shard.shape) for shard in shards] == [(2, 7)] * 4


@pytest.mark.parametrize(
    ("change", "tp_size", "message"),
    [
        ({}, 4, "tensor parallel size 4 must divide num_query_groups=6"),
        ({"ffn_hidden_size": 11}, 2, "tensor parallel size 2 must divide ffn_hidden_size=11"),
        ({"padded_vocab_size": 14}, 3, "must divide padded_vocab_size=14"),
        ({"padded_vocab_size": 12}, 1, "12 rows cannot hold the checkpoint's vocab_size=13"),
        ({"num_query_groups": 5}, 1, "num_key_value_heads=5 must divide num_attention_heads=12"),
    ],
)
def test_sizes_that_cannot_be_split_are_refused_with_the_numbers(
    change: dict[str, int], tp_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ModelDims(**{**DIMS.__dict__, **change}).check(ShardLayout(tp_size=tp_size))
