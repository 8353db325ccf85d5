"""Samples from servers that run already, perhaps another run's, and leaves them as they are.

Unlike ``SGLangEngine`` this neither pauses servers, nor lets paused ones go on, nor names their
weights. Whoever owns them may give them other weights meanwhile, which shows in ``labels``.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.checks import check_request
from megatron_rlsd.rollout.engine import EngineError, ResponsesDone
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.engine import resolved_api_key
from megatron_rlsd.rollout.sglang.replies import (
    generate_body,
    parse_generation,
    read_response,
    reply_limit,
)
from megatron_rlsd.types import Generation, GenerationRequest

POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0


class ReadingEngine:
    """Generates on the servers at ``config.urls``, each with ``max_in_flight`` requests at a time.

    vocab_size, max_positions: bounds on requests (max_positions None: no bound).
    """

    def __init__(self, config: SGLangConfig, vocab_size: int, max_positions: int | None) -> None:
        self._config = config
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._key = resolved_api_key(config.api_key)
        self._numbers, self._name = itertools.count(), uuid.uuid4().hex[:12]
        self.labels: list[str] = []
        """Names of the weights that sampled anything, as the servers told them, in that order."""
        self.on_progress: ResponsesDone | None = None

    @property
    def weight_version(self) -> int:
        """The version of the weights that answered last, an index of ``labels``."""
        return max(0, len(self.labels) - 1)

    def models(self) -> dict[str, str]:
        """URL -> the model that the server says it serves; raises EngineError for any that does
        not answer."""

        async def ask(client: SGLangClient) -> str:
            seconds = self._config.health_timeout_seconds
            await client.ready(timeout=seconds)
            return await client.model_path(timeout=seconds)

        async def ask_all() -> list[str]:
            clients = self._clients()
            try:
                return await asyncio.gather(*map(ask, clients))
            finally:
                await asyncio.gather(*(client.close() for client in clients))

        return dict(zip(self._config.urls, asyncio.run(ask_all()), strict=True))

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One generation per request, in order; ``weight_version`` is an index of ``labels``.

        A response that an update of the servers' owner interrupts is asked for again. Raises
        EngineError as ``SGLangEngine.generate`` does; each request is bounded by
        request_timeout_seconds and max_attempts.
        """
        for index, request in enumerate(requests):
            check_request(request, index, self._vocab_size, self._max_positions)
        return asyncio.run(self._all(requests))

    async def _all(self, requests: list[GenerationRequest]) -> list[Generation]:
        clients = self._clients()
        # Each server takes the next request when it has room: none waits for a slow one.
        waiting = list(enumerate(requests))[::-1]
        results: dict[int, Generation] = {}
        attempts = [0] * len(requests)

        def over() -> bool:
            return len(results) == len(requests)

        async def work(client: SGLangClient) -> None:
            while not over():
                if not waiting:  # another server may fail on one yet
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                index, request = waiting.pop()
                try:
                    results[index] = await self._ask(client, request)
                except ServerFault as fault:
                    attempts[index] += 1
                    if attempts[index] >= self._config.max_attempts:
                        raise EngineError(
                            f"request {index} failed {attempts[index]} times, the last time "
                            f"because {fault}"
                        ) from fault
                    waiting.append((index, request))
                    # It takes no other request before it answers: they would fail there too.
                    if not await self._recovered(client, over):
                        return
                else:
                    if self.on_progress is not None:
                        self.on_progress(len(results), len(requests))

        room = [client for _ in range(self._config.max_in_flight) for client in clients]
        try:
            async with asyncio.TaskGroup() as group:
                for client in room[: len(requests)]:
                    group.create_task(work(client))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await asyncio.gather(*(client.close() for client in clients))
        if not over():
            raise EngineError(
                f"{len(requests) - len(results)} of {len(requests)} responses are missing: no "
                f"server at {', '.join(self._config.urls)} has answered for "
                f"{self._config.start_timeout_seconds:g} s"
            )
        return [results[index] for index in range(len(requests))]

    async def _recovered(self, client: SGLangClient, over: Callable[[], bool]) -> bool:
        """Wait until the server is well; False after start_timeout_seconds, or without need."""
        end = time.monotonic() + self._config.start_timeout_seconds
        while not over() and time.monotonic() < end:
            await asyncio.sleep(RETRY_SECONDS)
            with suppress(ServerFault):
                await client.health(timeout=self._config.health_timeout_seconds)
                return True
        return False

    async def _ask(self, client: SGLangClient, request: GenerationRequest) -> Generation:
        rid = f"{self._name}-{next(self._numbers)}."
        content = await client.generate(
            generate_body(request, rid),
            timeout=self._config.request_timeout_seconds,
            max_bytes=reply_limit(request),
        )
        reply = read_response(content, client.url)
        # A response by several weights counts as the last ones'.
        label = reply.meta_info.weight_version
        if label not in self.labels:
            self.labels.append(label)
        generation = parse_generation(
            replace(reply, meta_info=reply.meta_info.model_copy(update={"weight_versions": []})),
            request,
            rid=rid,
            vocab_size=self._vocab_size,
            versions={label: self.labels.index(label)},
            server=client.url,
        )
        if generation.finish_reason == "abort":
            raise ServerFault(f"{client.url} aborted it")
        return generation

    def _clients(self) -> list[SGLangClient]:
        most = self._config.max_in_flight + 1
        urls = self._config.urls
        return [SGLangClient(url, api_key=self._key, max_connections=most) for url in urls]

    def close(self) -> None:
        """Nothing is held between calls."""
