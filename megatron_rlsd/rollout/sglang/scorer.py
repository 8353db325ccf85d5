"""Log-probabilities of given tokens from one SGLang server that runs already: a teacher's."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from megatron_rlsd.config import TeacherServerConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import RequestRefused, ServerFault
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.engine import resolved_api_key
from megatron_rlsd.rollout.sglang.replies import (
    parse_response_scores,
    response_score_body,
    score_limit,
)
from megatron_rlsd.runtime.open_files import allow_open_files

if TYPE_CHECKING:
    from megatron_rlsd.types import FloatArray

Answer = TypeVar("Answer")
FIRST_PAUSE_SECONDS = 0.5
"""Before the second try of a request; doubled each time."""


class SGLangScorer:
    """Asks the server at ``config.url``. Every call is bounded and makes connections of its own.

    Calls raise EngineError that names the server: where it cannot be reached or answers badly
    ``max_attempts`` times, refuses a request, or does not finish in time.
    """

    def __init__(self, config: TeacherServerConfig, vocab_size: int) -> None:
        assert config.url is not None
        self._config, self._url, self._vocab_size = config, config.url.rstrip("/"), vocab_size
        self._api_key = resolved_api_key(config.api_key, "teacher")
        in_flight = config.max_in_flight
        allow_open_files(in_flight, f"teacher.sglang.max_in_flight={in_flight}")

    def check(self) -> None:
        """EngineError unless the server is ready and its model embeds ``vocab_size`` tokens.

        It says so itself nowhere, but refuses to score a token outside its vocabulary.
        """
        asyncio.run(self._check())

    def score(self, sequences: list[tuple[list[int], list[int]]]) -> list[FloatArray]:
        """log_softmax(logits) of every response token, for pairs of prompt and response ids.

        Both are non-empty; the results, [T] float32 each, are in the order of ``sequences``.
        """
        return asyncio.run(self._score(sequences))

    async def _check(self) -> None:
        last = self._vocab_size - 1
        async with self._client() as client:
            seconds = self._config.request_timeout_seconds
            await self._retried(lambda: client.health(timeout=seconds))
            held = await self._knows(client, last)
            if not held or await self._knows(client, last + 1):
                raise EngineError(
                    f"{self._url}: the teacher's model embeds {'more' if held else 'fewer'} tokens "
                    f"than the student's {self._vocab_size}: on-policy distillation needs the same "
                    "tokenizer"
                )

    async def _knows(self, client: SGLangClient, token: int) -> bool:
        body = response_score_body([0], [0], f"teacher-{uuid.uuid4().hex}")
        body["token_ids_logprob"] = [token]
        try:
            seconds = self._config.request_timeout_seconds
            limit = score_limit(2)
            await self._retried(lambda: client.generate(body, timeout=seconds, max_bytes=limit))
        except RequestRefused as refusal:
            if "token_ids_logprob" not in str(refusal):
                raise
            return False
        return True

    async def _score(self, sequences: list[tuple[list[int], list[int]]]) -> list[FloatArray]:
        run, limit = uuid.uuid4().hex, self._config.score_timeout_seconds
        slots = asyncio.Semaphore(self._config.max_in_flight)

        async def one(client: SGLangClient, index: int) -> FloatArray:
            prompt, response = sequences[index]

            async def ask() -> FloatArray:
                # Another id each time: the server may still hold the one before.
                rid = f"teacher-{run}-{index}-{uuid.uuid4().hex}"
                body = response_score_body(prompt, response, rid)
                seconds = self._config.request_timeout_seconds
                limit = score_limit(len(prompt) + len(response))
                content = await client.generate(body, timeout=seconds, max_bytes=limit)
                return parse_response_scores(
                    content, prompt, response, vocab_size=self._vocab_size, server=self._url
                )

            async with slots:
                return await self._retried(ask)

        async with self._client() as client:
            tasks = [asyncio.create_task(one(client, i)) for i in range(len(sequences))]
            try:
                async with asyncio.timeout(limit):
                    return await asyncio.gather(*tasks)
            except TimeoutError:
                self._too_slow(sum(task.done() for task in tasks), len(tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _too_slow(self, done: int, wanted: int) -> NoReturn:
        limit = self._config.score_timeout_seconds
        raise EngineError(
            f"{self._url}: the teacher scored {done} of {wanted} responses within {limit:g} s "
            "(teacher.sglang.score_timeout_seconds)"
        )

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[SGLangClient]:
        client = SGLangClient(
            self._url, api_key=self._api_key, max_connections=self._config.max_in_flight
        )
        try:
            yield client
        finally:
            await client.close()

    async def _retried(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                return await ask()
            except ServerFault as fault:
                if attempt == self._config.max_attempts:
                    raise EngineError(
                        f"the teacher failed {attempt} times, last: {fault}"
                    ) from fault
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("max_attempts is at least 1")
