"""Servers as every trainer rank sees them: rank 0 speaks to them, the others wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist

from megatron_rlsd.parallel.exchange import broadcast_bytes, pack_message
from megatron_rlsd.rollout.engine import Arrived, Part, ResponsesDone
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import Generation, GenerationRequest

Result = TypeVar("Result")


class ServedEngine:
    """A TrainerEngine where servers generate. ``servers`` is None but on rank 0."""

    def __init__(self, servers: SGLangEngine | None, control: dist.ProcessGroup) -> None:
        self._servers, self._control = servers, control

    @property
    def on_progress(self) -> ResponsesDone | None:
        return None if self._servers is None else self._servers.on_progress

    @on_progress.setter
    def on_progress(self, progress: ResponsesDone | None) -> None:
        if self._servers is not None:
            self._servers.on_progress = progress

    @property
    def weight_version(self) -> int:
        return self._rank_zero_servers.weight_version

    @property
    def longest_prompt(self) -> int | None:
        """The limit of the server that takes the least; known on rank 0 once servers were ready."""
        return None if self._servers is None else self._servers.longest_prompt

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        return self._rank_zero_servers.generate(requests)

    def submit(
        self, requests: list[GenerationRequest], on_arrival: Arrived | None = None
    ) -> Future[list[Generation]]:
        return self._rank_zero_servers.submit_requests(requests, on_arrival=on_arrival)

    def counted(self) -> Counter[str]:
        return Counter() if self._servers is None else self._servers.counted()

    def run_on_rank_zero(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on rank 0; the others wait for it, within the process group's time limit."""
        if self._servers is None:
            broadcast_bytes(None, self._control)
            return None
        result = work()
        broadcast_bytes(pack_message("release", {}), self._control)
        return result

    def sleep(self) -> None:
        if self._servers is not None:
            self._servers.sleep()

    def wake(self, part: Part) -> None:
        if self._servers is not None:
            self._servers.wake(part)

    @property
    def _rank_zero_servers(self) -> SGLangEngine:
        assert self._servers is not None, "only rank 0 speaks to servers"
        return self._servers
