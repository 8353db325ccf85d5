"""All servers together: requests spread over them, and weight updates that reach all of them.

Everything here runs in one event loop, so no state needs a lock; ``CurrentWeights.lock`` only
orders weight updates and the servers that come back in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import Arrived, EngineError, ResponsesDone
from megatron_rlsd.rollout.routes import RoutesShape
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.balance import choose
from megatron_rlsd.rollout.sglang.calls import ServerCall, Stay, Work, joined
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.ownership import CLAIM, Doorbell
from megatron_rlsd.rollout.sglang.replies import (
    generate_body,
    parse_generation,
    parse_scores,
    read_response,
    reply_limit,
    score_body,
    score_limit,
)
from megatron_rlsd.rollout.sglang.server import (
    Server,
    State,
    Supervisor,
    new_client,
)
from megatron_rlsd.rollout.sglang.update import PauseMode, Update
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Generation, GenerationRequest


@dataclass
class CurrentWeights:
    """The weights that every server is to have; see FleetWeights."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    publications: int = 0
    version: int = 0
    load_current: Callable[[Server], Awaitable[None]] | None = None
    awake: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.awake.set()


class Fleet:
    """Servers of one configuration. ``start`` first; ``close`` ends the ones that are our own."""

    def __init__(
        self,
        config: SGLangConfig,
        *,
        model: str,
        dtype: str,
        vocab_size: int,
        api_key: str | None,
        run_dir: Path,
        claims: bool = True,
        routes: RoutesShape | None = None,
    ) -> None:
        """claims: the servers are for this run's weights, and no other run's while it lives."""
        self._config, self._vocab_size, self._routes = config, vocab_size, routes
        self.weights = CurrentWeights()
        self.counters = Counter(
            requests=0,
            request_retries=0,
            interrupted_requests=0,
            cached_prompt_tokens=0,
            shortened_responses=0,
        )
        """See SGLangEngine.counted."""
        urls = config.urls or [""] * config.num_servers
        self.servers = [
            Server(i, url, new_client(url, config, api_key), is_own=not config.urls)
            for i, url in enumerate(urls)
        ]
        self._doorbell = Doorbell(str(run_dir.absolute()), config.urls) if claims else None
        self._supervisors = [
            Supervisor(
                *(server, config, self.weights, self._doorbell, self._server_changed),
                model=model,
                dtype=dtype,
                api_key=api_key,
                log_dir=run_dir / "sglang",
            )
            for server in self.servers
        ]
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: deque[Work] = deque()
        self._calls: set[ServerCall] = set()
        self._changed = asyncio.Event()
        self._numbers, self._stays = itertools.count(), itertools.count()
        self._updating = False
        self._name = uuid.uuid4().hex[:12]
        self._closing = False
        self._told: set[Server] = set()
        """Those that the user knows to be given up."""

    async def start(self) -> None:
        """Begin to start or find all servers; ``wait_until_ready`` says how it went."""
        if self._doorbell is not None:
            await self._doorbell.open()
        for supervisor in self._supervisors:
            self._spawn(supervisor.run())

    async def wait_until_ready(self) -> None:
        """EngineError if a server does not start; each is bounded by start_timeout_seconds."""
        while any(server.state is State.STARTING for server in self.servers):
            self._raise_if_given_up()
            self._changed.clear()
            await self._changed.wait()
        self._raise_if_given_up()

    async def wait_for_one(self) -> None:
        """Until a server is ready. EngineError if none is left, or after start_timeout_seconds."""
        limit = self._config.start_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                while not any(server.state is State.READY for server in self.servers):
                    self._raise_if_none_is_left()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            states = "; ".join(f"{s} is {s.state.value}: {s.reason}" for s in self.servers)
            raise EngineError(f"no server was ready within {limit:g} s: {states}") from None

    def _raise_if_none_is_left(self) -> None:
        if all(server.state is State.GIVEN_UP for server in self.servers):
            reasons = "; ".join(f"{server}: {server.reason}" for server in self.servers)
            raise EngineError(f"no rollout server is left: {reasons}")

    def _raise_if_given_up(self) -> None:
        for server in self.servers:
            if server.state is State.GIVEN_UP:
                raise EngineError(server.reason)

    async def close(self) -> None:
        """End own servers; those at ``urls`` are left as they are."""
        self._closing = True
        for call in list(self._calls):
            call.fail(EngineError("the engine was closed"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pending.clear()
        processes = [server.process for server in self.servers if server.process is not None]
        for process in processes:
            process.ask_to_stop()
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in processes))
        for server in self.servers:
            server.lose("the engine was closed", State.GIVEN_UP)
            await server.client.close()
        if self._doorbell is not None:
            self._doorbell.close()

    # Generation

    @property
    def longest_prompt(self) -> int | None:
        """See SGLangEngine."""
        known = [s.max_tokens - 1 for s in self.servers if s.max_tokens is not None]
        return min(known, default=None)

    async def generate(
        self,
        requests: list[GenerationRequest],
        on_progress: ResponsesDone | None = None,
        on_arrival: Arrived | None = None,
    ) -> list[Generation]:
        """One generation per request, in order, sampled by the weights that are current meanwhile.

        A response that a weight update interrupts goes on under the new weights, and says for each
        token which ones sampled it. Cancelling this, or the time limit, aborts what still runs.
        """
        loop = asyncio.get_running_loop()
        call = ServerCall(
            requests,
            loop.create_future(),
            results=[None] * len(requests),
            remaining=len(requests),
            on_progress=on_progress,
            on_arrival=on_arrival,
        )
        if not requests:
            return []
        self._raise_if_none_is_left()
        works = [Work(call, index, next(self._numbers)) for index in range(len(requests))]
        fair_share = sum(work.tokens for work in works) // len(self.servers)
        for work in works:
            prompt = tuple(work.asked.prompt_ids)
            call.slack[prompt] = min(call.slack.get(prompt, 0) + work.tokens, fair_share)
        self._calls.add(call)
        self._pending.extend(works)
        self.counters["requests"] += len(works)
        limit = self._config.generate_timeout_seconds
        try:
            self._pump()
            async with asyncio.timeout(limit):
                await call.done
        except TimeoutError:
            raise EngineError(
                f"{call.remaining} of {len(requests)} responses were not there after "
                f"rollout.sglang.generate_timeout_seconds={limit:g}: {self._whereabouts(call)}"
            ) from None
        finally:
            self._calls.discard(call)
            self._pending = deque(work for work in self._pending if work.call is not call)
            for stay in list(call.running):
                if stay.task is not None:
                    stay.task.cancel()
        return [result for result in call.results if result is not None]

    def _pump(self) -> None:
        """Hand waiting requests, in order, to servers with room; none during a weight update."""
        while self._pending and not self._updating:
            room = {
                server: server.outstanding_tokens
                for server in self.servers
                if server.state is State.READY and len(server.attempts) < self._config.max_in_flight
            }
            if not room:
                break
            work = self._pending.popleft()
            prompt = tuple(work.asked.prompt_ids)
            call = work.call
            server = choose(room, call.servers.get(prompt), call.slack[prompt])
            call.servers[prompt] = server
            # SGLang aborts by prefix, so no id may begin another.
            rid = f"{self._name}-{work.number}-{next(self._stays)}."
            stay = Stay(work, server, rid, self.weights.version, self.weights.publications)
            call.running.add(stay)
            server.attempts.add(stay)
            server.outstanding_tokens += work.tokens
            stay.task = asyncio.create_task(self._ask(stay))
            stay.task.add_done_callback(functools.partial(self._stayed, stay))

    def _stayed(self, stay: Stay, task: asyncio.Task[Generation]) -> None:
        """A request has its result, goes back to the queue, or is not wanted any more.

        A callback rather than the end of ``_ask``, which never runs if it is cancelled early.
        """
        work, server = stay.work, stay.server
        work.call.running.discard(stay)
        server.attempts.discard(stay)
        server.outstanding_tokens -= work.tokens
        error = None if task.cancelled() else task.exception()
        if stay.lost_reason is not None:
            self._retry(work, f"{server} was lost: {stay.lost_reason}")
        elif task.cancelled():
            self._abort(server.client, stay.rid)
        elif isinstance(error, ServerFault):
            server.distrust(str(error))
            self._abort(server.client, stay.rid)
            self._retry(work, str(error))
        elif isinstance(error, EngineError):
            work.call.fail(EngineError(f"request {work.index}: {error}"))
        elif error is not None:
            work.call.fail(_bug(error))
        else:
            server.answered_well()
            self._answered(stay, task.result())
        self._pump()

    def _answered(self, stay: Stay, generation: Generation) -> None:
        work = stay.work
        if generation.finish_reason != "abort":
            work.call.finish(work.index, joined([*work.parts, generation]))
        elif self.weights.publications == stay.publications:
            self._retry(work, f"{stay.server} aborted it, and no weight update asked for that")
        else:
            work.parts += [generation] if len(generation.token_ids) else []
            self.counters["interrupted_requests"] += 1
            if not work.call.done.done():
                self._pending.appendleft(work)

    async def _ask(self, stay: Stay) -> Generation:
        work, server = stay.work, stay.server
        request = work.request
        assert server.max_tokens is not None
        room = server.max_tokens - len(request.prompt_ids)
        if room < 1 and work.parts:
            # Another server had more room for it.
            self.counters["shortened_responses"] += 1
            return Generation.of([], [], "length", stay.version)
        if room < 1:
            raise EngineError(
                f"the prompt has {len(request.prompt_ids)} tokens, and {server} takes at most "
                f"{server.max_tokens - 1}: its context, or what its cache holds"
            )
        shortened = room < request.params.max_new_tokens
        if shortened:
            request = replace(request, params=replace(request.params, max_new_tokens=room))
        content = await server.client.generate(
            generate_body(request, stay.rid, with_routes=self._routes is not None),
            timeout=self._config.request_timeout_seconds,
            max_bytes=reply_limit(request, self._routes),
        )
        reply = read_response(content, str(server))
        generation = parse_generation(
            *(reply, request),
            rid=stay.rid,
            vocab_size=self._vocab_size,
            versions=self._labels(server, stay.version),
            server=str(server),
            routes=self._routes,
        )
        self.counters["shortened_responses"] += shortened and generation.finish_reason == "length"
        self.counters["cached_prompt_tokens"] += reply.meta_info.cached_tokens or 0
        return generation

    def _labels(self, server: Server, oldest: int) -> dict[str, int]:
        """Label -> version of the weights that may have sampled what began under ``oldest``."""
        client = server.client
        versions = {client.label(v): v for v in range(oldest, self.weights.version + 1)}
        if self.weights.publications == 0 and client.owner is not None:
            # Those that it was started with.
            return {client.owner.label(CLAIM): 0}
        return versions

    def _retry(self, work: Work, reason: str) -> None:
        work.attempts += 1
        if work.call.done.done():
            return
        if work.attempts >= self._config.max_attempts:
            work.call.fail(
                EngineError(
                    f"request {work.index} ({len(work.asked.prompt_ids)} prompt tokens) failed "
                    f"{work.attempts} times, the last time because {reason}"
                )
            )
            return
        self.counters["request_retries"] += 1
        self._pending.appendleft(work)

    def _abort(self, client: SGLangClient, rid: str) -> None:
        async def abort() -> None:
            # Whether it still runs there or the server is gone: nothing waits for it any more.
            with contextlib.suppress(EngineError):
                await client.abort(rid)

        if not self._closing:
            self._spawn(abort())

    async def score(self, server: Server, sequences: list[list[int]]) -> list[list[float]]:
        """``server``'s log-probabilities, at temperature 1, of every token but each first."""
        rid = f"{self._name}-score-{next(self._numbers)}"
        seconds = self._config.request_timeout_seconds

        async def one(index: int, token_ids: list[int]) -> list[float]:
            body = score_body(token_ids, f"{rid}-{index}.")
            limit = score_limit(len(token_ids))
            content = await server.client.generate(body, timeout=seconds, max_bytes=limit)
            scores = parse_scores(
                content, token_ids, vocab_size=self._vocab_size, server=str(server)
            )
            return scores.tolist()

        return await asyncio.gather(*(one(i, ids) for i, ids in enumerate(sequences)))

    # Weights

    @contextlib.asynccontextmanager
    async def publishing(self, version: int, pause: PauseMode = "abort") -> AsyncIterator[Update]:
        """Pause every ready server, let the caller bring the weights, verify, continue.

        When the block ends, every server still in the update must report ``version``. A server that
        fails on the way, or that another run has taken, drops out: its supervisor brings it back
        with ``weights.load_current``. An exception in the block leaves the version as it was and
        goes on to the caller.
        """
        async with self.weights.lock:
            self.weights.publications += 1
            self._updating = True
            ready = [s for s in self.servers if s.state is State.READY]
            seconds = self._config.update_timeout_seconds
            update = Update(ready, version, seconds, keeps_cache=pause == "in_place")
            try:
                await update.begin(pause)
                yield update
                await update.check_version()
                self.weights.version = version
                for server in update.servers:
                    server.holds = self.weights.publications
                await update.on_each(lambda s: s.client.resume(timeout=seconds))
            except BaseException:
                # Servers that outlive this trainer must not stay paused for ever.
                await asyncio.gather(
                    *(server.client.resume(timeout=5.0) for server in ready),
                    return_exceptions=True,
                )
                raise
            finally:
                self._updating = False
        self._pump()

    # Bookkeeping

    def _server_changed(self) -> None:
        self._changed.set()
        self._tell_of_given_up()
        try:
            self._raise_if_none_is_left()
        except EngineError as error:
            for call in list(self._calls):
                call.fail(error)
        self._pump()

    def _tell_of_given_up(self) -> None:
        """The run goes on with the servers that are left, slower."""
        left = sum(server.state is not State.GIVEN_UP for server in self.servers)
        for server in self.servers:
            was_ready = server.max_tokens is not None
            if server.state is State.GIVEN_UP and was_ready and server not in self._told and left:
                warn(
                    f"{server} is given up, and the run goes on with {left} of "
                    f"{len(self.servers)} servers: {server.reason}"
                )
                self._told.add(server)

    def _whereabouts(self, call: ServerCall) -> str:
        places = Counter(str(stay.server) for stay in call.running)
        waiting = sum(work.call is call for work in self._pending)
        parts = [f"{count} at {name}" for name, count in sorted(places.items())]
        if waiting:
            states = ", ".join(
                f"{s} is {s.state.value}{f': {s.reason:.200}' if s.reason else ''}"
                for s in self.servers
            )
            parts.append(f"{waiting} waiting for a server ({states})")
        return "; ".join(parts)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # These tasks are not awaited, and silence would look like a hang.
            for call in list(self._calls):
                call.fail(_bug(error))


def _bug(error: BaseException) -> EngineError:
    wrapped = EngineError(f"{type(error).__name__} in the rollout client: {error}")
    wrapped.__cause__ = error
    return wrapped
