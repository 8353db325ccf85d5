"""The stream that every transport publishes, and the buckets that it is packed into."""

from __future__ import annotations

import base64
import io
import os
import pickle
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing import reductions

from megatron_rlsd.weight_sync import WeightSyncError, flat
from megatron_rlsd.weight_sync.flat import FlatWeights
from megatron_rlsd.weight_sync.host_copies import HostCopies
from megatron_rlsd.weight_sync.payload import payload, shared_buffer
from megatron_rlsd.weight_sync.transport import checked


def tensors() -> list[tuple[str, torch.Tensor]]:
    """Odd sizes and three item sizes, so that tensors come to lie at odd places."""
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(10, 10, generator=generator)),
        ("b", torch.randn(7, generator=generator).bfloat16()),
        ("c", torch.randn(3, 5, generator=generator)),
        ("d", torch.tensor(2.5)),
        ("e", torch.randn(400, generator=generator)),
        ("f", torch.arange(5, dtype=torch.uint8)),
        ("g", torch.empty(0, 4)),
    ]


@pytest.fixture
def source(tmp_path):
    save_file({"a": torch.ones(10, 10), "other": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("bucket_bytes", [1, 14, 400, 10**6])
def test_buckets_hold_every_tensor_bit_for_bit_and_can_be_filled_again(bucket_bytes):
    weights = FlatWeights(bucket_bytes, lambda n: torch.empty(n, dtype=torch.uint8))
    for factor in (1, 3):
        expected = {name: tensor * factor for name, tensor in tensors()}
        seen = {}
        for bucket in weights.refill(iter(expected.items())):
            assert bucket.nbytes <= bucket_bytes or len(bucket.entries) == 1
            at = 0
            for entry in bucket.entries:
                # As SGLang cuts a flattened bucket: one after the other without gaps.
                flat = bucket.flat[at : at + entry.nbytes].clone()
                seen[entry.name] = flat.view(entry.dtype).view(entry.shape)
                at += entry.nbytes
            assert at == bucket.nbytes == len(bucket.flat)
        assert list(seen) == list(weights) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(seen[name], tensor)
            assert torch.equal(weights[name], tensor)


def test_another_stream_may_follow_in_the_same_buffers():
    weights = FlatWeights(100, lambda n: torch.empty(n, dtype=torch.uint8))
    large = [("a", torch.ones(100)), ("b", torch.ones(3))]
    small = [(str(i), torch.full((7,), float(i))) for i in range(30)]
    assert [bucket.nbytes for bucket in weights.refill(large)] == [400, 12]
    # Not more in a bucket because its buffer had to be larger before.
    # The first is small: nothing can be sent before it is full.
    assert [bucket.nbytes for bucket in weights.refill(small)] == [28, *[84] * 9, 56]
    assert all(torch.equal(weights[name], tensor) for name, tensor in small)
    assert list(weights.refill(large)) == weights.buckets
    assert torch.equal(weights["a"], torch.ones(100))


def test_a_bucket_on_a_device_is_sent_before_it_is_in_main_memory(monkeypatch):
    """Its way there goes through few slots, none of which is filled again too early."""
    started, allowed = [], threading.Event()

    def start(source, slot):
        started.append((source, slot))

        def wait():
            assert allowed.wait(60)
            slot.copy_(source)

        return wait

    monkeypatch.setattr(flat, "HostCopies", partial(HostCopies, slots=3, start=start))
    weights = FlatWeights(800, lambda n: torch.empty(n, dtype=torch.uint8), torch.device("cpu"))
    sent = [("a", torch.arange(20.0)), ("large", torch.arange(350.0)), ("b", torch.ones(3))]
    buckets = weights.refill(sent)
    first = next(buckets)
    # On the device it is whole; the copy has begun and is not done.
    assert dict(first.tensors())["a"].equal(sent[0][1])
    assert len(started) == 1
    assert not first.copying[0].done()
    # The large one needs two slots of 800 bytes.
    assert next(buckets).nbytes == 1400
    assert [slot.numel() for _, slot in started] == [80, 800, 600]
    last: list[flat.FlatBucket] = []
    waiting = threading.Thread(target=lambda: last.extend(buckets))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "no slot is free"
    allowed.set()
    waiting.join(60)
    assert len(last) == 1
    assert len({slot.data_ptr() for _, slot in started}) <= 3
    assert all(torch.equal(weights[name], tensor) for name, tensor in sent)
    weights.clear()


def test_a_copy_to_main_memory_that_failed_is_not_taken_for_the_weights(monkeypatch):
    def start(source, slot):
        def wait():
            raise RuntimeError("the GPU is gone")

        return wait

    monkeypatch.setattr(flat, "HostCopies", partial(HostCopies, start=start))
    weights = FlatWeights(100, lambda n: torch.empty(n, dtype=torch.uint8), torch.device("cpu"))
    assert len(list(weights.refill([("a", torch.ones(3))]))) == 1
    with pytest.raises(RuntimeError, match="the GPU is gone"):
        weights["a"].sum()


def test_a_stream_may_reuse_its_buffer():
    buffer = torch.empty(5)
    weights = FlatWeights(1000, lambda n: torch.empty(n, dtype=torch.uint8))
    list(weights.refill((name, buffer.fill_(i)) for i, name in enumerate("xyz")))
    assert [weights[name][0].item() for name in "xyz"] == [0, 1, 2]


def test_a_cast_leaves_integers_alone(source):
    stream = [("f", torch.tensor([1.0, 2.0])), ("i", torch.tensor([3]))]
    found = dict(checked(stream, source, torch.bfloat16))
    assert (found["f"].dtype, found["i"].dtype) == (torch.bfloat16, torch.int64)
    assert dict(checked(stream, source, None))["f"].dtype == torch.float32


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([], "no tensors"),
        ([("x", torch.ones(1)), ("x", torch.ones(1))], "tensor x .* twice"),
        ([("a", torch.ones(10, 9))], r"a has the shape \[10, 9\], but \[10, 10\] in"),
    ],
)
def test_streams_that_cannot_be_the_model_are_refused(source, stream, message):
    with pytest.raises(WeightSyncError, match=message):
        list(checked(stream, source, None))


def test_a_payload_is_read_back_by_torchs_own_functions():
    """As SGLang reads it: an unpickler that knows a few names, none of them SGLang's."""

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            assert (module, name) in {
                (reductions.__name__, "rebuild_tensor"),
                (reductions.__name__, "rebuild_typed_storage"),
                (reductions.__name__, "rebuild_storage_filename"),
                ("torch", "Tensor"),
                ("torch", "uint8"),
                ("torch", "float32"),
                ("torch", "bfloat16"),
                ("torch.storage", "UntypedStorage"),
                ("types", "SimpleNamespace"),
            }
            return super().find_class(module, name)

    weights = FlatWeights(1300, shared_buffer)
    seen = {}
    for bucket in weights.refill(iter(tensors())):
        # Once a tensor-parallel rank.
        for _ in range(2):
            with payload(bucket, on_gpu=False) as text:
                read = Reader(io.BytesIO(base64.b64decode(text))).load()
            for entry in read["metadata"]:
                flat = read["flattened_tensor"][entry.start_idx : entry.end_idx].clone()
                assert entry.numel == flat.numel()
                seen[entry.name] = flat.view(entry.dtype).reshape(entry.shape)
    assert all(torch.equal(seen[name], tensor) for name, tensor in tensors())
    # The reader's own view outlives the buffers, and the memory goes with it.
    del weights, bucket
    assert not list(Path("/dev/shm").glob(f"*_{os.getpid()}_*"))
    assert read["flattened_tensor"].numel() == read["metadata"][-1].end_idx
