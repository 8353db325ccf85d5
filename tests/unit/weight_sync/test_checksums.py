"""Checksums of SGLang's parameters, from Hugging Face tensors. Real servers: tests/sglang."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlsd.weight_sync import WeightSyncError, checksums, word_hash
from megatron_rlsd.weight_sync.checksums import ParameterHashes, Rank, pieces_of, word_hash_pieces
from megatron_rlsd.weight_sync.verify import Comparison

ALONE = Rank(0, 1, 2)
LAYER = "model.layers.0.self_attn"


def held(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def joined(name: str, tensors: dict[str, torch.Tensor], rank: Rank = ALONE) -> torch.Tensor:
    """The parameter's elements in order."""
    pieces = pieces_of(name, tensors, rank)
    assert pieces is not None
    return torch.cat([piece.reshape(-1) for piece in pieces])


@pytest.mark.parametrize(
    ("count", "dtype", "expected"),
    # Computed by SGLang 0.5.23's gpu_tensor_hash kernel in Triton's interpreter.
    [
        (1, torch.int32, "f3b1336a88b2abf4"),
        (5, torch.bfloat16, "71acc00baf11bb1c"),
        (8193, torch.float32, "10a3a6c025ecd785"),
        (40000, torch.float32, "4ed14f1e7c778aee"),
    ],
)
@pytest.mark.parametrize("chunk", [6, 4 * 8192, 2**24])
def test_the_word_hash_is_that_of_sglangs_kernel(monkeypatch, chunk, count, dtype, expected):
    monkeypatch.setattr(word_hash, "CHUNK_BYTES", chunk)
    tensor = (torch.arange(count) * 3 - 7).to(dtype)
    assert word_hash_pieces([tensor]) == expected
    assert word_hash_pieces([tensor[: count // 2], tensor[count // 2 :]]) == expected


def test_pieces_may_come_in_any_order_and_end_within_a_word():
    data = torch.randint(-(2**15), 2**15, (40_003,), generator=torch.Generator().manual_seed(3))
    data = data.to(torch.int16)
    whole = word_hash_pieces([data])
    cuts = [0, 1, 4, 9, 8192, 20_001, 39_000, 40_003]
    hashed = word_hash.WordHash(data.nbytes, torch.device("cpu"))
    for first, last in reversed(list(pairwise(cuts))):
        hashed.add(data[first:last], 2 * first)
    assert word_hash.digest(int(hashed.result())) == whole
    # Columns of a matrix, whose rows do not lie one after the other.
    columns = data[:40_000].view(200, 200)[:, 7:150]
    assert word_hash_pieces([columns]) == word_hash_pieces([columns.contiguous()])


def test_hashing_takes_a_bounded_amount_of_memory(monkeypatch):
    """Beside the pieces: no copy of the parameter, whatever its size."""
    monkeypatch.setattr(word_hash, "CHUNK_BYTES", 2**16)
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                own = all(result.untyped_storage().data_ptr() != p.data_ptr() for p in pieces)
                sizes.append(result.untyped_storage().nbytes() * own)
            return result

    pieces = [torch.ones(2**20, dtype=torch.bfloat16), torch.ones(2**19, dtype=torch.bfloat16)]
    with Largest():
        word_hash_pieces(pieces)
    # Places are counted in 64 bits before they become words.
    assert 0 < max(sizes) <= 2 * 2**16


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parameters_are_hashed_from_tensors_as_they_come(size):
    """Bit for bit what is computed from all tensors together, for every rank and kind."""
    tensors = held(
        **{f"{LAYER}__{p}_proj__weight": (n, 6) for p, n in (("q", 16), ("k", 4), ("v", 4))},
        **{f"m__experts__{e}__{p}_proj__weight": (8, 6) for e in range(3) for p in ("gate", "up")},
        **{f"m__experts__{e}__down_proj__weight": (6, 8) for e in range(3)},
        model__embed_tokens__weight=(70, 6),
        a__o_proj__weight=(6, 16),
        a__norm__weight=(5,),
        unused__weight=(3,),
    )
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    names = [f"{LAYER}.qkv_proj.weight", "m.experts.w13_weight", "m.experts.w2_weight"]
    names += ["model.embed_tokens.weight", "a.o_proj.weight", "a.norm.weight"]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for number in range(size):
        rank = Rank(number, size, 2)
        expected = checksums.expected_checksums(names, tensors, rank, word_hash_pieces)
        assert list(expected) == names
        hashes = ParameterHashes([*names, "not.known"], shapes, rank)
        for name in sorted(tensors, reverse=True):
            assert hashes.digests().keys() < set(names)
            hashes.take(name, tensors[name])
        assert hashes.digests() == expected


def test_the_byte_hash_is_the_beginning_of_sha256():
    a, b = torch.randn(3, 4), torch.randn(5).bfloat16()
    whole = a.numpy().tobytes() + b.view(torch.int16).numpy().tobytes()
    expected = hashlib.sha256(whole).digest()[:8].hex()
    assert checksums.sha256_pieces([a, b]) == expected


def test_attention_and_experts_are_joined_as_sglang_joins_them():
    parts = held(
        **{f"{LAYER}__{p}_proj__weight": (n, 3) for p, n in (("q", 8), ("k", 4), ("v", 4))},
    )
    expected = torch.cat([parts[f"{LAYER}.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(joined(f"{LAYER}.qkv_proj.weight", parts), expected.reshape(-1))
    experts = held(
        **{
            f"m__experts__{e}__{p}_proj__weight": (4, 6) if p != "down" else (6, 4)
            for e in range(3)
            for p in ("gate", "up", "down")
        }
    )

    def of(expert: int, part: str) -> torch.Tensor:
        return experts[f"m.experts.{expert}.{part}_proj.weight"]

    w13 = torch.stack([torch.cat([of(e, "gate"), of(e, "up")]) for e in range(3)])
    assert torch.equal(joined("m.experts.w13_weight", experts), w13.reshape(-1))
    second = torch.stack([torch.cat([of(e, "gate")[2:], of(e, "up")[2:]]) for e in range(3)])
    assert torch.equal(joined("m.experts.w13_weight", experts, Rank(1, 2, 2)), second.reshape(-1))
    w2 = torch.stack([of(e, "down")[:, :2] for e in range(3)])
    assert torch.equal(joined("m.experts.w2_weight", experts, Rank(0, 2, 2)), w2.reshape(-1))


def test_key_and_value_heads_are_repeated_where_ranks_outnumber_them():
    parts = held(**{f"{LAYER}__{p}_proj__bias": (n,) for p, n in (("q", 8), ("k", 4), ("v", 4))})
    q, k, v = (parts[f"{LAYER}.{p}_proj.bias"] for p in "qkv")
    found = joined(f"{LAYER}.qkv_proj.bias", parts, Rank(2, 4, 2))
    assert torch.equal(found, torch.cat([q[4:6], k[2:], v[2:]]))


def test_the_vocabulary_is_filled_up_with_zeros():
    tensors = held(model__embed_tokens__weight=(70, 3))
    table = tensors["model.embed_tokens.weight"]
    full = torch.zeros(128, 3)
    full[:70] = table
    name = "model.embed_tokens.weight"
    assert torch.equal(joined(name, tensors), full.reshape(-1))
    assert torch.equal(joined(name, tensors, Rank(1, 2, 2)), full[64:].reshape(-1))


def test_a_cpu_server_fills_up_the_intermediate_size():
    tensors = held(**{f"m__{p}_proj__weight": (96, 3) for p in ("gate", "up")})
    tensors |= held(m__down_proj__weight=(3, 96))
    rank = Rank(1, 2, 2, 32)
    gate, up = (torch.zeros(128, 3) for _ in range(2))
    gate[:96], up[:96] = tensors["m.gate_proj.weight"], tensors["m.up_proj.weight"]
    found = joined("m.gate_up_proj.weight", tensors, rank)
    assert torch.equal(found, torch.cat([gate[64:], up[64:]]).reshape(-1))
    down = torch.zeros(3, 128)
    down[:, :96] = tensors["m.down_proj.weight"]
    assert torch.equal(joined("m.down_proj.weight", tensors, rank), down[:, 64:].reshape(-1))
    assert torch.equal(
        joined("m.down_proj.weight", tensors, Rank(0, 2, 2)),
        tensors["m.down_proj.weight"][:, :48].reshape(-1),
    )


def test_what_cannot_be_derived_is_not_guessed():
    tensors = held(a__q_proj__weight=(2, 2), a__k_proj__weight=(2, 2), norm__weight=(2,))
    assert pieces_of("a.qkv_proj.weight", tensors, ALONE) is None
    assert pieces_of("a.some_scale", tensors, ALONE) is None
    assert torch.equal(joined("norm.weight", tensors, Rank(1, 2, 2)), tensors["norm.weight"])


def test_a_comparison_names_server_and_tensors_and_refuses_to_prove_nothing():
    Comparison("server 0", 3, matching={"a"}).raise_if_wrong()
    with pytest.raises(WeightSyncError, match=r"server 1 .*version 3 .*: b\.weight differ \(1 oth"):
        Comparison("server 1", 3, matching={"a"}, wrong={"b.weight"}).raise_if_wrong()
    with pytest.raises(WeightSyncError, match="verify_interval=0"):
        Comparison("server 1", 3, unknown={"a"}).raise_if_wrong()
