"""What a save and a load take of a rank's memory, beside the state that it trains."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.start import Start
from megatron_rlsd.config import parse_config
from megatron_rlsd.sft import supervised_update
from megatron_rlsd.teacher import WeightSnapshot
from tests.actors import actor_of
from tests.distributed.ranks import run_on_ranks
from tests.models import save_random_model

SLACK = 24 * 2**20
"""Buffers of files and of collectives, and what the interpreter itself takes meanwhile."""


def test_a_save_copies_at_most_the_shard_and_a_load_three_pieces(tmp_path: Path) -> None:
    model = transformers.LlamaConfig(
        vocab_size=24_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    save_random_model(model, tmp_path / "model")
    run_on_ranks(measure, 2, str(tmp_path), seconds=200)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        state, piece = found["state"], found["largest_piece"]
        assert state > 6 * SLACK, "too small a model to tell"
        assert found["in_place"] < 2 * piece + SLACK
        # The copy must be there, or training would change what is being written.
        assert state - SLACK < found["in_background"] < state + SLACK
        assert found["load"] < 3 * piece + SLACK


def measure(folder: str) -> None:
    path = Path(folder)
    raw = {
        "run_dir": str(path),
        "model": {"hf_path": str(path / "model"), "dtype": "float32"},
        "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
        "reward": {"functions": [{"name": "exact_match"}]},
        "parallel": {"tensor": 2},
    }
    config = parse_config(raw)
    found: dict[str, int] = {}
    with actor_of(config, 20, seconds=120) as actor:
        groups = actor.groups
        snapshot = WeightSnapshot(actor.parameters(), torch.float32)
        state = TrainingState(actor, {"teacher": snapshot.tensors}, dict)
        supervised_update(actor, [Sequence.of([1, 2, 3], [4, 5])])  # fills the optimizer's state
        parameters = [p.nbytes for p in actor.parameters().values()]
        found["state"] = 4 * sum(parameters)  # weights, two moments, the teacher's weights
        found["largest_piece"] = max(parameters)
        for name, background in (("first", False), ("in_place", False), ("in_background", True)):
            raw["checkpoint"] = {"async_save": background}
            checkpoints = Checkpointer(parse_config(raw), groups)
            dist.barrier(groups.control)
            with memory_growth(name, found):
                checkpoints.save(state, 1, path / name)
                checkpoints.finish()
        dist.barrier(groups.control)
        with memory_growth("load", found):
            checkpoints.load(state, Start(str(path / "in_place"), step=1))
        (path / f"rank_{groups.rank}.json").write_text(json.dumps(found))


@contextmanager
def memory_growth(name: str, found: dict[str, int]) -> Iterator[None]:
    """Largest growth of this process's own memory inside the block, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide growth
    start = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    found[name] = peak - start


def own_memory() -> int:
    """Anonymous pages, without those of mapped files."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024
