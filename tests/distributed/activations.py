"""Measure what a forward pass of the actor's model keeps for its backward pass."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.ops import PolicyLossConfig
from tests.actors import actor_of
from tests.distributed.ranks import next_world


class KeptForBackward:
    """Within the block: every storage that autograd saves, parameters left out."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._known = {p.untyped_storage()._cdata for p in parameters}
        self._saved: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        # Not by address: a recompute gives memory back that another tensor then takes.
        self._saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for storage, t in self._saved.items() if storage not in self._known]

    @property
    def bytes(self) -> int:
        """Counted when asked: what a recompute has given back by then is not in it."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    @property
    def summary(self) -> str:
        """How many storages there are of each size, dtype and shape, the largest share first."""
        found = Counter(
            (t.untyped_storage().nbytes(), str(t.dtype), tuple(t.shape)) for t in self.tensors
        )
        largest = sorted(found.items(), key=lambda item: -item[0][0] * item[1])
        return "; ".join(
            f"{count} x {size} bytes {dtype} {shape}" for (size, dtype, shape), count in largest
        )


class InFlight:
    """Counts passes of a model's chunks that went forward and not yet backward."""

    def __init__(self, chunks: list[Any]) -> None:
        self.now = self.most = 0
        for chunk in chunks:
            chunk.register_forward_hook(self._forward)

    def _forward(self, module: Any, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            self.now += 1
            self.most = max(self.most, self.now)
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.now -= 1


def measure_in_flight(cases: list[dict[str, Any]], out: str) -> None:
    """On every rank: the most chunk passes in flight in an update, for each case."""
    found = []
    for case in cases:
        with actor_of(case_config(case), 1, seconds=60) as actor:
            flying = InFlight(actor.chunks)
            sequences = [Sequence.of([1, 2], [3] * (n - 1)) for n in case["lengths"]]
            tokens = sum(len(s.response_ids) for s in sequences)
            values = TokenValues(
                advantages=torch.ones(tokens), loss_weights=torch.full((tokens,), 1 / tokens)
            )
            actor.update([sequences], values, PolicyLossConfig(), 1.0)
            found.append({"most": flying.most, "left": flying.now})
            rank = actor.groups.rank
        next_world()
    Path(out, f"{rank}.json").write_text(json.dumps(found))


def case_config(case: dict[str, Any]) -> Config:
    """``case``: path of the model, its dtype, recompute settings, and the parallel section."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": case["path"], **case.get("model", {})},
            "parallel": case.get("parallel", {}),
            "rollout": case.get("rollout", {}),
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "train": {"max_tokens_per_microbatch": case["tokens"]},
        }
    )


def measure_activations(cases: list[dict[str, Any]], out: str) -> None:
    """On every rank: bytes kept by one micro-batch of ``lengths``, for each case, to out/RANK.json.

    The head is left out: it gets hidden states and hands them back.
    """
    found = []
    for case in cases:
        with actor_of(case_config(case), None, seconds=60) as actor:
            lengths = case["lengths"]
            sequences = [Sequence.of([1] * (n - n // 2), [2] * (n // 2 + 1)) for n in lengths]
            _, (micro_batch,) = actor._micro_batches([sequences] * actor.groups.dp.size())
            (chunk,) = actor.chunks
            chunk.train()
            with KeptForBackward(list(chunk.parameters())) as kept:
                hidden = chunk(
                    micro_batch.tokens,
                    micro_batch.position_ids,
                    packed_seq_params=micro_batch.packed_seq_params,
                    head=lambda hidden, weight: hidden,
                )
            sizes = sorted(
                (t.untyped_storage().nbytes(), str(t.dtype), list(t.shape)) for t in kept.tensors
            )
            found.append({"bytes": kept.bytes, "tensors": sizes})
            hidden.float().sum().backward()  # what was kept can be used
            rank = actor.groups.rank
        next_world()
    Path(out, f"{rank}.json").write_text(json.dumps(found))
