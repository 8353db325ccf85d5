"""The endpoint that agents ask: a server of its own thread, whose requests the trainer takes.

POST /v1/chat/completions     Authorization: Bearer SESSION_KEY
POST /sessions/SESSION_KEY/reward  {"reward": 0.5}  (also below /v1)
GET  /v1/models
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_rlsd.environments.sessions import chat
from megatron_rlsd.runtime.errors import UserError

MAX_REQUEST_BYTES = 1 << 26
BACKLOG = 4096
STOP_SECONDS = 5
GONE = (
    "no episode is under way with this session key: it has ended, or it never began; each episode "
    "has a key of its own"
)
OVER = "this episode's part of the run has ended"

Told = chat.Reply | tuple[int, dict[str, Any]]
"""What a request is answered with: a turn of the model, or a status and a refusal."""


@dataclass(frozen=True)
class Asked:
    """A request for a turn. It has to be answered, once."""

    key: str
    body: Any
    """The JSON data; None where it was none."""
    answer: Callable[[Told], None]
    """May be called in any thread."""
    problem: str = ""
    """Why there is no ``body``."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once the client has closed its connection without an answer."""


@dataclass(frozen=True)
class Rewarded:
    """What an agent thinks of its episode. It is answered already."""

    key: str
    reward: float | None
    """None: what came is none."""
    problem: str = ""


Event = Asked | Rewarded


class SessionServer:
    """Keeps what agents ask until it is taken; ``with SessionServer(host, port) as server``.

    Only sessions that are open are listened to.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = threading.Lock()
        self._open: frozenset[str] = frozenset()
        self._inbox: deque[Event] = deque()
        self.url = ""
        """The address of ``/v1``, which agents are given."""

    def __enter__(self) -> Self:
        """Raises UserError where the address cannot be bound."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind((self._host, self._port))
            # From now on: who asks before the thread has begun waits for it.
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            where = f"environment.sessions.host={self._host} port={self._port}"
            raise UserError(f"{where}: {error.strerror or error}") from None
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{self._listener.getsockname()[1]}/v1"
        self.wake, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._application(),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=STOP_SECONDS,
                lifespan="off",
                backlog=BACKLOG,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listener],), name="sessions", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.close_sessions()
        self._server.should_exit = True
        self._thread.join(2 * STOP_SECONDS)
        self._listener.close()
        if not self._thread.is_alive():
            os.close(self.wake)
            os.close(self._ring)

    def open_sessions(self, keys: Iterable[str]) -> None:
        with self._lock:
            self._open = frozenset(keys)

    def close_sessions(self) -> None:
        """Listen to none; what was not taken is refused."""
        with self._lock:
            self._open = frozenset()
            left, self._inbox = self._inbox, deque()
        for event in left:
            if isinstance(event, Asked):
                event.answer((410, chat.error(OVER)))

    def take(self) -> list[Event]:
        """What has come since the last call, in its order; ``wake`` is readable where any has."""
        with suppress(BlockingIOError):
            os.read(self.wake, 4096)
        with self._lock:
            events = list(self._inbox)
            self._inbox.clear()
        return events

    def _put(self, event: Event) -> bool:
        """False: the session is not open."""
        with self._lock:
            if event.key not in self._open:
                return False
            self._inbox.append(event)
        with suppress(BlockingIOError):  # a full pipe is readable as well
            os.write(self._ring, b"!")
        return True

    def _application(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/sessions/{key}/reward", self._reward, methods=["POST"]),
            Route("/v1/sessions/{key}/reward", self._reward, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _chat(self, request: Request) -> Response:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return _refusal(401, "expected the session key as bearer token (api_key)")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Told] = loop.create_future()

        def settle(answer: Told) -> None:
            if not told.done():
                told.set_result(answer)

        def answer(value: Told) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, value)

        try:
            body, problem = await _json(request)
        except ClientDisconnect:
            return Response()  # to no one
        asked = Asked(key.strip(), body, answer, problem)
        if not self._put(asked):
            return _refusal(410, GONE)
        leaving = asyncio.ensure_future(request.receive())
        either: set[asyncio.Future[Any]] = {told, leaving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not told.done():
            asked.gone.set()
            return Response()
        found = told.result()
        if not isinstance(found, chat.Reply):
            status, refusal = found
            return JSONResponse(refusal, status_code=status)
        if found.request.stream:
            return StreamingResponse(_events(found), media_type="text/event-stream")
        return JSONResponse(found.whole())

    async def _reward(self, request: Request) -> Response:
        try:
            body, problem = await _json(request)
        except ClientDisconnect:
            return Response()
        value = body.get("reward") if isinstance(body, dict) else None
        reward = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):
                reward = float(value)
        if not problem and not math.isfinite(reward):
            problem = f'expected {{"reward": a finite number}}, got {body!r:.80}'
        event = Rewarded(request.path_params["key"], None if problem else reward, problem)
        if not self._put(event):
            return _refusal(410, GONE)
        return _refusal(400, problem) if problem else JSONResponse({"status": "ok"})


async def _models(request: Request) -> Response:
    model = {"id": "policy", "object": "model", "created": 0, "owned_by": "megatron_rlsd"}
    return JSONResponse({"object": "list", "data": [model]})


async def _events(reply: chat.Reply) -> AsyncIterator[str]:
    for chunk in reply.chunks():
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


async def _json(request: Request) -> tuple[Any, str]:
    """The body's JSON data; or None and why there is none. Raises ClientDisconnect."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_REQUEST_BYTES:
                return None, f"a request of more than {MAX_REQUEST_BYTES} bytes"
        return json.loads(content), ""
    except (ValueError, RecursionError) as error:
        return None, f"the request is not JSON: {error}"


def _refusal(status: int, message: str) -> Response:
    return JSONResponse(chat.error(message), status_code=status)
