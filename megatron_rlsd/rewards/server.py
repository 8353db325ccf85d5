"""The functions of a configuration's reward section behind HTTP, for trainers elsewhere.

rlsd reward-server CONFIG.yaml [key=value ...]

GET  /health  {"status": "ok", "functions": [...], "workers": 8, "queued": 0}
POST /score   {"samples": [RewardInput as JSON, ...]}
           -> {"results": [{"value", "parts", "errors", "timed_out"}, ...]}, in their order
"""

from __future__ import annotations

import asyncio
import hmac
import json
import queue
import signal
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_rlsd.config import RewardConfig
from megatron_rlsd.config.secrets import key_of
from megatron_rlsd.rewards.pool import RewardPool
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem, RewardInput, RewardResult

MAX_REQUEST_BYTES = 1 << 26
STILL_THERE_SECONDS = 1.0
"""Between two looks whether whoever asked still waits."""
STOP_SECONDS = 10
"""For answers under way when the server is told to end."""


class Full(Exception):
    """More responses wait than the server keeps."""


class Scorers:
    """``reward.workers`` workers, each of which takes the next response as it becomes free."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises UserError as RewardPool does."""
        # What a failure means is for whoever asked to say, and so is what to keep.
        functions = [f.model_copy(update={"deterministic": False}) for f in config.functions]
        each = config.model_copy(
            update={
                "functions": functions,
                "workers": 1,
                "on_error": "leave_out",
                "max_error_share": 1.0,
            }
        )
        self.workers, self._max_queued = config.workers, config.server.max_queued
        self._pools = [RewardPool(each) for _ in range(config.workers)]
        self._free: queue.SimpleQueue[RewardPool] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="scorer")
        self.queued = 0
        """Responses that are not scored yet. Counted in the event loop's thread."""

    def __enter__(self) -> Self:
        for pool in self._pools:
            pool.__enter__()
        for pool in self._pools:
            pool.wait_until_ready()
            self._free.put(pool)
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.close()

    async def score(
        self, samples: list[RewardInput], wanted: Callable[[], Awaitable[bool]]
    ) -> list[RewardResult] | None:
        """The results in the order of the samples; None where no request waits for them any more.

        ``wanted`` is awaited from time to time. Raises Full, and what RewardPool.score raises.
        """
        if self.queued + len(samples) > self._max_queued:
            raise Full
        self.queued += len(samples)
        futures = [self._threads.submit(self._score, sample) for sample in samples]
        left = {asyncio.wrap_future(future) for future in futures}
        try:
            while left:
                _, left = await asyncio.wait(left, timeout=STILL_THERE_SECONDS)
                if left and not await wanted():
                    return None
            return [future.result() for future in futures]
        finally:
            self.queued -= len(samples)
            for future in futures:
                future.cancel()

    def _score(self, sample: RewardInput) -> RewardResult:
        pool = self._free.get()
        try:
            (result,) = pool.score([sample])
        finally:
            self._free.put(pool)
        return result


def application(config: RewardConfig, scorers: Scorers) -> Starlette:
    """Raises UserError for a key that cannot be one."""
    try:
        key = key_of(config.server.api_key, "reward.server.api_key")
    except ValueError as error:
        raise UserError(str(error)) from None

    async def health(request: Request) -> Response:
        told = {"functions": config.labels, "workers": scorers.workers, "queued": scorers.queued}
        return JSONResponse({"status": "ok", **told})

    async def score(request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return _refusal(401, "the bearer token is not reward.server.api_key")
        try:
            samples = await _samples(request)
            results = await scorers.score(samples, lambda: _waits(request))
        except ValueError as error:
            return _refusal(400, str(error))
        except Full:
            reason = f"{scorers.queued} responses wait; reward.server.max_queued bounds them"
            return _refusal(503, reason, {"Retry-After": "1"})
        except UserError as error:
            return _refusal(500, str(error))
        return JSONResponse({"results": [asdict(each) for each in results or ()]})

    routes = [Route("/health", health), Route("/score", score, methods=["POST"])]
    return Starlette(routes=routes)


async def _samples(request: Request) -> list[RewardInput]:
    """ValueError for what is none, and for too much of it."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of more than {MAX_REQUEST_BYTES} bytes")
    try:
        told = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(told, dict) or not isinstance(told.get("samples"), list):
        raise ValueError('expected {"samples": [...]}')
    return [_sample(number, given) for number, given in enumerate(told["samples"])]


def _sample(number: int, given: Any) -> RewardInput:
    # Not by pydantic, which takes no text with half of a surrogate pair; workers do.
    try:
        problem = given["problem"]
        turns = {key: tuple(problem.get(key, ())) for key in ("messages", "demonstration")}
        whole = {"problem": Problem(**{**problem, **turns})}
        sample = RewardInput(**{**given, **whole, "transcript": tuple(given.get("transcript", ()))})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"samples.{number}: {type(error).__name__}: {error}") from None
    if not isinstance(sample.response, str):
        raise ValueError(f"samples.{number}.response: expected a text")
    return sample


async def _waits(request: Request) -> bool:
    return not await request.is_disconnected()


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


def serve(config: RewardConfig) -> None:
    """Score until a signal ends it.

    Raises UserError where a function cannot be loaded, or the address cannot be bound.
    """
    settings = config.server
    scorers = Scorers(config)
    app = application(config, scorers)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(
                f"reward.server.host={settings.host} port={settings.port}: {error.strerror}"
            ) from None
        with scorers:
            port = listener.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            print(
                f"scoring with {', '.join(config.labels)} in {config.workers} workers at "
                f"http://{host}:{port}",
                flush=True,
            )
            _until_told(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    timeout_graceful_shutdown=STOP_SECONDS,
                    lifespan="off",
                ),
                listener,
            )
    print("the reward server has ended", flush=True)


def _until_told(settings: uvicorn.Config, listener: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT comes; uvicorn raises it again when it has ended."""
    previous = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
