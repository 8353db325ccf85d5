"""One server of the fleet, and the supervisor that keeps it usable."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.answers import ServerFault
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.ownership import (
    CLAIM,
    SETTLE_SECONDS,
    Doorbell,
    ServerInUse,
    ServerOwner,
)
from megatron_rlsd.rollout.sglang.process import (
    ServerProcess,
    free_port,
    hidden_environment,
    server_command,
    server_environment,
)
from megatron_rlsd.runtime.warn import warn

POLL_SECONDS = 0.25
MAX_FAULTS = 3
"""Faults without a good answer in between after which even a healthy server is restarted."""
MAX_FAILED_LOADS = 2
"""Times in a row that a server that came back may refuse the current weights, or hold others after
them: they may be at fault."""
ENDING_SECONDS = 2.0
"""Between a server's last word and the end of its process."""
MAX_PAUSE_SECONDS = 60.0


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    """Gets no new requests until it has passed a check."""
    DOWN = "down"
    """Lost; it is started or waited for again."""
    GIVEN_UP = "given up"


class Attempt(Protocol):
    """One request's stay at one server."""

    def lost(self, reason: str) -> None:
        """The server will not answer any more."""


@dataclass(eq=False)
class Server:
    """What the fleet knows of one server."""

    index: int
    url: str
    client: SGLangClient
    is_own: bool
    process: ServerProcess | None = None
    state: State = State.STARTING
    reason: str = ""
    """Why it is not ready."""
    attempts: set[Attempt] = field(default_factory=set)
    outstanding_tokens: int = 0
    """Prompt tokens and most possible response tokens of the requests it works on."""
    starts: int = 0
    answered: int = 0
    restarts: int = 0
    faults: int = 0
    """Restarts since its last good answer, and times that it lost the fleet's trust since."""
    failed_loads: int = 0
    max_tokens: int | None = None
    """Prompt and response of one request that it answers in full; None: never ready yet."""
    holds: int | None = None
    """FleetWeights.publications when it got its weights from us. Its own label does not tell: an
    earlier run may have left other weights there under the same version."""
    recheck: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        return f"server {self.index} ({self.url})"

    def answered_well(self) -> None:
        self.answered += 1
        self.restarts = self.faults = 0

    def distrust(self, reason: str) -> None:
        """Give it no more requests until its supervisor has checked it, which it does now."""
        if self.state is State.READY:
            # One fault, however many requests were hit by it.
            self.faults += 1
            self.state, self.reason = State.SUSPECT, reason
        self.recheck.set()

    def lose(self, reason: str, state: State = State.DOWN) -> None:
        """It is gone; its requests go elsewhere."""
        self.state, self.reason, self.holds = state, reason, None
        for attempt in list(self.attempts):
            attempt.lost(reason)


class FleetWeights(Protocol):
    """What a supervisor needs to know of the weights that are current."""

    lock: asyncio.Lock
    """Held while weights change anywhere."""
    publications: int
    version: int
    load_current: Callable[[Server], Awaitable[None]] | None
    """Brings the current weights to one server; None: none were published yet."""
    awake: asyncio.Event
    """Not set while the servers have given back memory: none is asked anything, or started."""


class Supervisor:
    """Starts a server or waits for it, watches it, and starts it again.

    doorbell: of this run, which the server is given the weights of; None: it is kept for others.
    """

    def __init__(
        self,
        server: Server,
        config: SGLangConfig,
        weights: FleetWeights,
        doorbell: Doorbell | None,
        changed: Callable[[], None],
        *,
        model: str,
        dtype: str,
        api_key: str | None,
        log_dir: Path,
    ) -> None:
        self._server, self._config, self._weights = server, config, weights
        self._doorbell, self._changed = doorbell, changed
        """``changed`` is called when the server's state has changed."""
        self._launch = ""
        """The label that our own process was started with, until it has answered."""
        self._model, self._dtype, self._api_key, self._log_dir = model, dtype, api_key, log_dir

    async def run(self) -> None:
        """Until cancelled, or until the server is given up."""
        try:
            await self._keep_up()
        except Exception as error:
            self._server.lose(f"{type(error).__name__}: {error}", State.GIVEN_UP)
            self._changed()
            raise

    async def _keep_up(self) -> None:
        server, first = self._server, True
        while True:
            # A server that starts meanwhile would take the memory that the trainer uses.
            await self._weights.awake.wait()
            try:
                await self._bring_up(bounded=first or server.is_own)
                first = False
                self._changed()
                reason = await self._watch()
            except EngineError as error:
                reason = str(error)
            if server.is_own and server.process is not None:
                # Quick and certain: it may hang, and it holds memory that its successor needs.
                await asyncio.to_thread(server.process.kill)
            hopeless = (
                server.restarts >= self._config.max_restarts
                or server.failed_loads >= MAX_FAILED_LOADS
            )
            if first or (server.is_own and hopeless):
                server.lose(reason, State.GIVEN_UP)
                self._changed()
                return
            server.lose(reason)
            self._changed()
            warn(f"{server} is out: {reason}")
            await asyncio.sleep(min(MAX_PAUSE_SECONDS, 0.5 * 2**server.restarts))
            server.restarts += 1

    async def _bring_up(self, *, bounded: bool) -> None:
        """Until the server is ready with the current weights. EngineError if it will not be."""
        server = self._server
        if server.is_own:
            await self._start_process()
        limit = self._config.start_timeout_seconds
        deadline = time.monotonic() + limit if bounded else float("inf")
        while True:
            if server.process is not None and not server.process.running:
                raise EngineError(f"{server} ended while it started.{self._log()}")
            try:
                await server.client.ready(timeout=5.0)
                break
            except ServerFault as fault:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{server} was not ready after {limit:g} s ({fault}).{self._log()}"
                    ) from None
                if not server.is_own:
                    await self._wake_if_left()
                await asyncio.sleep(POLL_SECONDS)
        facts = await server.client.facts(timeout=self._config.update_timeout_seconds)
        server.max_tokens = facts.max_tokens
        async with self._weights.lock:
            await self._claim()
            await self._bring_weights()
            if not server.is_own:
                # It may have been lost because it hung, and still take requests.
                await server.client.health(timeout=self._config.health_timeout_seconds)
            server.recheck.clear()
            server.faults, server.state, server.reason = 0, State.READY, ""

    async def _wake_if_left(self) -> None:
        """A server that a killed trainer left paused in the middle of an update is not ready."""
        client = self._server.client
        try:
            await raise_if_in_use(client, await client.weight_version(timeout=5.0))
            await client.resume(timeout=5.0)
        except ServerInUse:
            raise
        except ServerFault:
            return

    async def _claim(self) -> None:
        """With the lock held: the server is ours, or ServerInUse names whose it is."""
        server, client = self._server, self._server.client
        seconds = self._config.update_timeout_seconds
        label = await client.weight_version(timeout=seconds)
        if self._launch not in ("", label) and not await asyncio.to_thread(self._listens):
            raise EngineError(
                f"{server}: another server answers there, with the weights {label!r:.100}, and not "
                "the one that was started; end it, or set another rollout.sglang.port"
                f"{self._log()}"
            )
        # It is known from now on, whatever others may call its weights.
        self._launch = ""
        if self._doorbell is None:
            return
        client.owner = self._doorbell.towards(client.url)
        if client.owner.owns(label):
            return
        await raise_if_in_use(client, label)
        await client.set_label(client.owner.label(CLAIM), timeout=seconds)
        if not server.is_own:
            await asyncio.sleep(SETTLE_SECONDS)
            label = await client.weight_version(timeout=seconds)
            if not client.owner.owns(label):
                await raise_if_in_use(client, label)
                raise ServerFault(
                    f"{server}: another run took it at the same time ({label!r:.100})"
                )

    def _listens(self) -> bool:
        """Does the process that was started answer there? A run that knows the URL may have claimed
        it before its first answer to us."""
        process, port = self._server.process, urlsplit(self._server.url).port
        return process is not None and port is not None and process.listens_on(port)

    async def _start_process(self) -> None:
        server, config = self._server, self._config
        port = config.port + server.index if config.port else free_port(config.host)
        self._launch = f"launch-{uuid.uuid4().hex}"
        command = server_command(
            config,
            model=self._model,
            dtype=self._dtype,
            index=server.index,
            port=port,
            label=self._launch,
        )
        server.process = ServerProcess(
            command,
            server_environment(config) | hidden_environment(config, self._api_key),
            self._log_dir / f"server_{server.index}.log",
        )
        server.starts += 1
        await server.client.close()
        server.url = local_url(config.host, port)
        server.client = new_client(server.url, config, self._api_key)
        server.state = State.STARTING

    async def _bring_weights(self) -> None:
        """With the lock held: no server takes traffic with other weights than the current ones."""
        client, seconds = self._server.client, self._config.update_timeout_seconds
        # A weight update may have left it paused.
        await client.resume(timeout=seconds)
        if self._weights.load_current is None:
            return
        wanted = client.label(self._weights.version)
        if await self._is_stale():
            try:
                await self._weights.load_current(self._server)
            except EngineError:
                # One that died, of whatever, is started as often as any other.
                self._server.failed_loads += not await self._ends()
                raise
            self._server.failed_loads = 0
            self._server.holds = self._weights.publications
        found = await client.weight_version(timeout=seconds)
        if found != wanted:
            raise ServerFault(f"{self._server}: expected weight_version {wanted}, got {found}")

    async def _ends(self) -> bool:
        """Has our own process ended, or does it within ENDING_SECONDS?"""
        process = self._server.process
        for _ in range(round(ENDING_SECONDS / POLL_SECONDS)):
            if process is None or not process.running:
                break
            await asyncio.sleep(POLL_SECONDS)
        return process is not None and not process.running

    async def _watch(self) -> str:
        """Return why the server can no longer be used."""
        server, config = self._server, self._config
        failures = 0
        next_check = time.monotonic() + config.health_interval_seconds
        while True:
            if not server.recheck.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await server.recheck.wait()
            if server.process is not None and not server.process.running:
                return f"its process ended.{self._log()}"
            due = server.recheck.is_set() or time.monotonic() >= next_check
            if not due or self._weights.lock.locked() or not self._weights.awake.is_set():
                await asyncio.sleep(POLL_SECONDS)
                continue
            publications = self._weights.publications
            try:
                await self._check()
            except ServerFault as fault:
                # A server that was paused or fell asleep meanwhile could not answer.
                asleep = not self._weights.awake.is_set()
                changing = self._weights.lock.locked()
                if asleep or changing or self._weights.publications != publications:
                    if server.state is State.SUSPECT:
                        server.recheck.set()
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                failures += 1
                if failures >= config.health_failures:
                    return f"{failures} failed checks in a row, the last: {fault}"
                if server.state is State.READY:
                    server.state, server.reason = State.SUSPECT, str(fault)
                server.recheck.set()
                await asyncio.sleep(POLL_SECONDS)
                continue
            if server.state is State.SUSPECT and server.faults >= MAX_FAULTS:
                return f"{server.faults} faults in a row, the last: {server.reason}"
            failures = 0
            next_check = time.monotonic() + config.health_interval_seconds

    async def _check(self) -> None:
        """ServerFault unless it is healthy. If there was doubt: ready again, with the current
        weights, unless more doubt came up meanwhile."""
        server, seconds = self._server, self._config.health_timeout_seconds
        server.recheck.clear()
        if server.state is State.SUSPECT:
            async with self._weights.lock:
                # Or a server that a broken update left paused would look as if it hung.
                await server.client.resume(timeout=seconds)
        await server.client.health(timeout=seconds)
        if server.state is not State.SUSPECT or server.faults >= MAX_FAULTS:
            return
        # A publication between the look at its weights and the trust would pass it by.
        async with self._weights.lock:
            if await self._is_stale():
                await self._claim()
                await self._bring_weights()
            if not server.recheck.is_set():
                server.state, server.reason = State.READY, ""
        self._changed()

    async def _is_stale(self) -> bool:
        if self._weights.load_current is None:
            return False
        seconds = self._config.health_timeout_seconds
        found = await self._server.client.weight_version(timeout=seconds)
        was_given = self._server.holds == self._weights.publications
        return not was_given or found != self._server.client.label(self._weights.version)

    def _log(self) -> str:
        process = self._server.process
        if process is None:
            return ""
        return f" The end of {process.log}:\n{process.last_lines()}"


async def raise_if_in_use(client: SGLangClient, label: str) -> None:
    """ServerInUse if a living run, other than the client's own, has given it weights."""
    owner, ours = ServerOwner.of(label), client.owner
    if ours is not None and ours.owns(label):
        return
    if owner is not None and (name := await owner.living()) is not None:
        raise ServerInUse(
            f"{client.url} is in use by {name}: a server has the weights of one run; end that run, "
            "or give this one other rollout.sglang.urls"
        )


def connections(config: SGLangConfig) -> int:
    """Most that are open to one server at a time."""
    # A few more than the requests: health checks, aborts and updates must get through.
    return config.max_in_flight + 16


def new_client(url: str, config: SGLangConfig, api_key: str | None) -> SGLangClient:
    return SGLangClient(url, api_key=api_key, max_connections=connections(config))


def local_url(host: str, port: int) -> str:
    """Where a server that binds ``host`` is reached from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{reachable}:{port}"
