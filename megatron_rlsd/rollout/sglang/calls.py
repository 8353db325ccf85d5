"""What is asked of the servers: calls of many requests, and a request's stays at servers.

A weight update may interrupt a stay. What it sampled is kept, and the next stay goes on from there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_rlsd.rollout.engine import Arrived, EngineError, ResponsesDone
from megatron_rlsd.rollout.sglang.server import Server
from megatron_rlsd.types import Generation, GenerationRequest

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


@dataclass(eq=False)
class ServerCall:
    """One ``generate``: a place for each result, filled once."""

    requests: list[GenerationRequest]
    done: asyncio.Future[None]
    results: list[Generation | None]
    remaining: int
    running: set[Stay] = field(default_factory=set)
    servers: dict[tuple[int, ...], Server] = field(default_factory=dict)
    """Prompt -> the server that had it last."""
    slack: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Prompt -> tokens by which its server may be busier than the others: the group's own, but no
    more than a server's fair share of the call."""
    on_progress: ResponsesDone | None = None
    on_arrival: Arrived | None = None

    def finish(self, index: int, generation: Generation) -> None:
        """One request has its result."""
        assert self.results[index] is None, "a request was answered twice"
        self.results[index] = generation
        self.remaining -= 1
        if self.on_arrival is not None:
            self.on_arrival(index, generation)
        if self.on_progress is not None:
            self.on_progress(len(self.results) - self.remaining, len(self.results))
        if self.remaining == 0 and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: EngineError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class Work:
    """A request that waits for a server."""

    call: ServerCall
    index: int
    number: int
    """Unique in the fleet's life."""
    attempts: int = 0
    parts: list[Generation] = field(default_factory=list)
    """What weight updates left of it; the rest is sampled by the new weights."""

    @property
    def asked(self) -> GenerationRequest:
        return self.call.requests[self.index]

    @property
    def request(self) -> GenerationRequest:
        """What is still to be sampled."""
        return continued(self.asked, self.parts)

    @property
    def tokens(self) -> int:
        return len(self.asked.prompt_ids) + self.asked.params.max_new_tokens


class Stay:
    """A request at a server (server.Attempt)."""

    def __init__(
        self, work: Work, server: Server, rid: str, version: int, publications: int
    ) -> None:
        self.work, self.server, self.rid = work, server, rid
        self.version, self.publications = version, publications
        """The weights' version when it began, and how many updates had begun by then."""
        self.task: asyncio.Task[Generation] | None = None
        self.lost_reason: str | None = None

    def lost(self, reason: str) -> None:
        self.lost_reason = reason
        if self.task is not None:
            self.task.cancel()


def continued(request: GenerationRequest, parts: list[Generation]) -> GenerationRequest:
    """The request for what is left once ``parts`` have been sampled."""
    if not parts:
        return request
    done = [token for part in parts for token in part.token_ids.tolist()]
    left = request.params.max_new_tokens - len(done)
    return replace(
        request,
        prompt_ids=request.prompt_ids + done,
        params=replace(request.params, max_new_tokens=left),
    )


def versions_of(part: Generation) -> IntArray:
    """[T] int32, the version that sampled each token."""
    if part.token_versions is not None:
        return part.token_versions
    return np.full(len(part.token_ids), part.weight_version, np.int32)


def joined(parts: list[Generation]) -> Generation:
    """The parts as one generation, which ends as the last one does."""
    if len(parts) == 1:
        return parts[0]
    versions = np.concatenate([versions_of(part) for part in parts])
    return Generation(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        log_probs=np.concatenate([part.log_probs for part in parts]),
        finish_reason=parts[-1].finish_reason,
        weight_version=int(versions[0]),
        token_versions=versions if versions[0] != versions[-1] else None,
        routed_experts=joined_routes([part.routed_experts for part in parts]),
    )


def joined_routes(parts: list[Tensor | None]) -> Tensor | None:
    """The routes of a whole response, of parts that each bring those of all tokens before, too.

    A token's are those of the first part that has them, whose weights sampled what came after it.
    """
    whole: Tensor | None = None
    for part in parts:
        if part is not None:
            whole = part if whole is None else torch.cat([whole, part[len(whole) :]])
    return whole
