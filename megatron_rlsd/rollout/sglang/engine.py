"""The fleet as the trainer's main thread sees it: plain calls, each bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.config.secrets import key_of
from megatron_rlsd.rollout.checks import check_request
from megatron_rlsd.rollout.engine import Arrived, EngineError, Part, ResponsesDone
from megatron_rlsd.rollout.routes import RoutesShape
from megatron_rlsd.rollout.sglang.fleet import Fleet
from megatron_rlsd.rollout.sglang.memory import SharedMemory
from megatron_rlsd.rollout.sglang.server import Server, State, connections
from megatron_rlsd.rollout.sglang.update import PauseMode, Update
from megatron_rlsd.runtime.open_files import allow_open_files
from megatron_rlsd.types import Generation, GenerationRequest

Result = TypeVar("Result")
SLACK_SECONDS = 60.0
"""On top of the limits inside the event loop, which come first and say more."""


class SGLangEngine:
    """Generates on SGLang servers, its own or those at ``config.urls``.

    Servers begin to start on construction; the first call waits for them. Requests, supervision
    and health checks run in an event loop in a thread of its own, so they go on while the caller
    trains.

    config: rollout.sglang; hf_path: the model that own servers load and its config.json; dtype: of
    their weights; vocab_size, max_positions: bounds on requests (a server dies of a token id
    beyond its vocabulary); run_dir: logs go to run_dir/sglang; pause: what weight updates do to
    requests under way; claims: the servers are to have this run's weights, so those that a living
    run uses are refused; routes: have generations say which experts tokens took.
    Raises EngineError for an API key that is not set; UserError where the system lets this process
    open too few connections (it raises its soft limit by itself).
    """

    def __init__(
        self,
        config: SGLangConfig,
        *,
        hf_path: str | Path,
        dtype: str,
        vocab_size: int,
        max_positions: int | None,
        run_dir: Path,
        pause: PauseMode = "abort",
        claims: bool = True,
        routes: RoutesShape | None = None,
    ) -> None:
        self._config, self._pause = config, pause
        self.on_progress: ResponsesDone | None = None
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._ready = self._closed = False
        api_key = resolved_api_key(config.api_key)
        servers = len(config.urls) or config.num_servers
        allow_open_files(
            servers * connections(config),
            f"rollout.sglang.max_in_flight={config.max_in_flight} at {servers} servers",
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        self.fleet: Fleet = self.call(
            self._new_fleet(
                model=str(Path(hf_path).absolute()),
                dtype=dtype,
                vocab_size=vocab_size,
                api_key=api_key,
                run_dir=run_dir,
                claims=claims,
                routes=routes,
            ),
            SLACK_SECONDS,
        )
        self.memory = SharedMemory(self.fleet, config.update_timeout_seconds)

    async def _new_fleet(self, **settings: Any) -> Fleet:
        fleet = Fleet(self._config, **settings)
        await fleet.start()
        return fleet

    @property
    def weight_version(self) -> int:
        """Version that every server serves; 0: the weights they were started with."""
        return self.fleet.weights.version

    @property
    def longest_prompt(self) -> int | None:
        """Tokens; what is longer, some server refuses. None before any server was ready."""
        return self.fleet.longest_prompt

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One generation per request, in order; see ``RolloutEngine.generate``.

        A response that would pass what its server holds of one request ends there, with the
        finish_reason ``length``; ``shortened_responses`` counts these.

        The seeds are passed on, but only servers with ``enable_deterministic_inference`` obey them.
        Raises EngineError, before anything is generated, for a request that cannot be served; later
        when requests fail on ``max_attempts`` servers, when no server is left, and when
        ``generate_timeout_seconds`` have passed.
        """
        limit = self._config.generate_timeout_seconds + SLACK_SECONDS
        future = self.submit_requests(requests, self.on_progress)
        return self.wait(future, limit, "generate")

    def submit_requests(
        self,
        requests: list[GenerationRequest],
        on_progress: ResponsesDone | None = None,
        on_arrival: Arrived | None = None,
    ) -> Future[list[Generation]]:
        """``generate`` while the caller goes on; waits only for the servers' first start.

        Both functions are called in the client's thread, which waits for them.
        """
        for index, request in enumerate(requests):
            check_request(request, index, self._vocab_size, self._max_positions)
        self.wait_until_ready()
        return self.submit(self.fleet.generate(requests, on_progress, on_arrival))

    def wait_until_ready(self) -> None:
        """Wait for the first start of every server; EngineError says which failed and why."""
        if not self._ready:
            limit = self._config.start_timeout_seconds + SLACK_SECONDS
            self.call(self.fleet.wait_until_ready(), limit)
            self._ready = True

    def score_on_each(self, sequences: list[list[int]]) -> dict[str, list[list[float]]]:
        """By server that is ready: log_softmax(logits) of every token but each sequence's first.

        sequences: token ids, each of at least 2 and short of the model's longest by some.
        """
        self.wait_until_ready()

        async def score() -> dict[str, list[list[float]]]:
            await self.fleet.wait_for_one()
            ready = [s for s in self.fleet.servers if s.state is State.READY]
            return {str(s): await self.fleet.score(s, sequences) for s in ready}

        limit = self._config.request_timeout_seconds * len(self.fleet.servers)
        limit += self._config.start_timeout_seconds + SLACK_SECONDS
        return self.call(score(), limit)

    def counted(self) -> Counter[str]:
        """Since the start: ``requests``, ``request_retries``, ``cached_prompt_tokens``,
        ``shortened_responses`` and ``server_restarts``."""
        counted = Counter(self.fleet.counters)
        counted["server_restarts"] = sum(max(0, s.starts - 1) for s in self.fleet.servers)
        return counted

    @contextmanager
    def publishing(self, version: int) -> Iterator[Update]:
        """``Fleet.publishing`` for plain code; use ``call`` or ``submit`` inside."""
        self.wait_until_ready()
        update = self.fleet.publishing(version, self._pause)
        # Servers that came back may be loading weights just now.
        others = 1 + len(self.fleet.servers)
        limit = 4 * others * self._config.update_timeout_seconds + SLACK_SECONDS
        opened = self.call(update.__aenter__(), limit)
        try:
            yield opened
        except BaseException as error:
            self.call(update.__aexit__(type(error), error, error.__traceback__), limit)
            raise
        self.call(update.__aexit__(None, None, None), limit)

    def call(self, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
        """Run ``work`` in the event loop and wait for it, at most ``seconds``."""
        name = getattr(work, "__qualname__", "its work")
        return self.wait(self.submit(work), seconds, name)

    def wait(self, future: Future[Result], seconds: float, what: str) -> Result:
        """The result of what was submitted; EngineError that says ``what`` after ``seconds``."""
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise EngineError(
                f"the rollout client did not finish {what} within {seconds:g} s"
            ) from None
        except BaseException:
            future.cancel()
            raise

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run ``work`` in the event loop while the caller goes on."""
        if self._closed:
            work.close()
            raise EngineError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def sleep(self) -> None:
        """The servers give back the memory of weights and cache; nothing may be under way."""
        self.call(self.memory.release(), 2 * self._config.update_timeout_seconds + SLACK_SECONDS)

    def wake(self, part: Part) -> None:
        """``weights`` before new ones are published, ``kv_cache`` after; see SharedMemory."""
        self.call(self.memory.resume(part), self._config.update_timeout_seconds + SLACK_SECONDS)

    def set_loader(self, load_current: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        """From now on servers that come back get the current weights by ``load_current``."""
        self.fleet.weights.load_current = load_current

    def close(self) -> None:
        """End own servers with all their processes; it serves no request after."""
        if self._closed:
            return
        try:
            self.call(self.fleet.close(), SLACK_SECONDS)
        finally:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(SLACK_SECONDS)
            self._loop.close()


def resolved_api_key(configured: SecretStr | None, section: str = "rollout") -> str | None:
    """What ``section``.sglang.api_key stands for; EngineError where ``key_of`` refuses it."""
    try:
        return key_of(configured, f"{section}.sglang.api_key")
    except ValueError as error:
        raise EngineError(str(error)) from None
