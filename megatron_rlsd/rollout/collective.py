"""One engine replica on every trainer rank, driven from rank 0 as if it were a single engine.

Rank 0 runs the rollout logic as straight code and calls ``generate``; meanwhile the other ranks are
in ``assist``, which answers each call with its slice of the requests until rank 0 releases them. A
rank that fails ends its process; the others then fail in their next collective, at the latest after
the process group's time limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    gather_bytes,
    pack_message,
    ragged,
    unpack_message,
    unragged,
)
from megatron_rlsd.rollout.engine import Arrived, EngineError, Part, ResponsesDone, RolloutEngine
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams

Result = TypeVar("Result")


class CollectiveEngine:
    """A TrainerEngine; see the module's docstring for what the ranks other than 0 do."""

    def __init__(self, engine: RolloutEngine, control: dist.ProcessGroup) -> None:
        self._engine, self._control = engine, control

    @property
    def on_progress(self) -> ResponsesDone | None:
        """Rank 0's: told of its own slice of the requests."""
        return self._engine.on_progress

    @on_progress.setter
    def on_progress(self, progress: ResponsesDone | None) -> None:
        self._engine.on_progress = progress

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    @property
    def longest_prompt(self) -> int | None:
        """None: the model's positions are the only bound."""
        return None

    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on rank 0 while the other ranks generate for it; they return None."""
        if dist.get_rank() != 0:
            self._assist()
            return None
        result = work()
        broadcast_bytes(pack_message("release", {}), self._control)
        return result

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Rank 0 only: spread the requests over all ranks; responses in the requests' order."""
        message = broadcast_bytes(_pack_requests(requests), self._control)
        answers = self._answer(message)
        assert answers is not None
        return [generation for answer in answers for generation in _unpack_generations(answer)]

    def submit(
        self, requests: list[GenerationRequest], on_arrival: Arrived | None = None
    ) -> Future[list[Generation]]:
        """Raises EngineError: the ranks that would sample are the ones that train."""
        raise EngineError(
            "the embedded engine samples only while training waits for it; "
            "rollout.asynchronous needs rollout.engine=sglang"
        )

    def counted(self) -> Counter[str]:
        return Counter()

    def sleep(self) -> None:
        """Nothing to do: the replica stays on the device (rollout.colocated is for servers)."""

    def wake(self, part: Part) -> None:
        """Nothing to do, see ``sleep``."""

    def _assist(self) -> None:
        while True:
            message = broadcast_bytes(None, self._control)
            if unpack_message(message)[0] == "release":
                return
            self._answer(message)

    def _answer(self, message: bytes) -> list[bytes] | None:
        requests = _unpack_requests(message)
        rank, world = dist.get_rank(), dist.get_world_size()
        # Contiguous slices keep the samples of one prompt together: they share its prefill.
        mine = requests[len(requests) * rank // world : len(requests) * (rank + 1) // world]
        generations = self._engine.generate(mine) if mine else []
        return gather_bytes(_pack_generations(generations), self._control)


def _pack_requests(requests: list[GenerationRequest]) -> bytes:
    header = [{"seed": r.seed, "params": asdict(r.params)} for r in requests]
    return pack_message(header, ragged("prompt_ids", [np.asarray(r.prompt_ids) for r in requests]))


def _unpack_requests(message: bytes) -> list[GenerationRequest]:
    header, tensors = unpack_message(message)
    prompts = [ids.tolist() for ids in unragged("prompt_ids", tensors)]
    return [
        GenerationRequest(
            prompt_ids=prompt_ids,
            seed=item["seed"],
            params=SamplingParams(
                **item["params"] | {"stop_token_ids": tuple(item["params"]["stop_token_ids"])}
            ),
        )
        for item, prompt_ids in zip(header, prompts, strict=True)
    ]


def _pack_generations(generations: list[Generation]) -> bytes:
    header = [[g.finish_reason, g.weight_version] for g in generations]
    return pack_message(
        header,
        ragged("token_ids", [g.token_ids for g in generations])
        | ragged("log_probs", [g.log_probs for g in generations], np.float32)
        | {
            f"routed_experts.{number}": generation.routed_experts
            for number, generation in enumerate(generations)
            if generation.routed_experts is not None
        },
    )


def _unpack_generations(message: bytes) -> list[Generation]:
    header, tensors = unpack_message(message)
    return [
        Generation(
            token_ids=token_ids,
            log_probs=log_probs,
            finish_reason=reason,
            weight_version=version,
            routed_experts=tensors.get(f"routed_experts.{number}"),
        )
        for number, ((reason, version), token_ids, log_probs) in enumerate(
            zip(header, unragged("token_ids", tensors), unragged("log_probs", tensors), strict=True)
        )
    ]
