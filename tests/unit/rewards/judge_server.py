"""A server on a real port that answers, or fails, in any way that a test wants."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

Connection = asyncio.StreamWriter


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any


Answer = Callable[[Request, Connection], Awaitable[None]]


def reply(
    body: Any, status: str = "200 OK", headers: dict[str, str] | None = None, length: int = 0
) -> Answer:
    """Answers with this JSON, or these bytes; ``length``: more than are sent."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def answer(request: Request, connection: Connection) -> None:
        lines = {"Content-Length": str(length or len(content)), "Connection": "close"}
        lines |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + content)
        await connection.drain()

    return answer


async def hang(request: Request, connection: Connection) -> None:
    await asyncio.sleep(3600)


async def hang_up(request: Request, connection: Connection) -> None:
    pass


async def speak_another_protocol(request: Request, connection: Connection) -> None:
    connection.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    await connection.drain()


async def never_end(request: Request, connection: Connection) -> None:
    connection.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    with suppress(ConnectionError):
        while True:
            connection.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            await connection.drain()


@dataclass
class JudgeServer:
    """``answer`` is given each request; one connection, one request."""

    answer: Callable[[Request], Answer]
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = started.result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *raised: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, connection: Connection) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (x.partition(": ") for x in head[1:-2])
            }
            content = await reader.readexactly(int(headers["content-length"]))
            request = Request(head[0].split()[1], headers, json.loads(content))
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            try:
                await self.answer(request)(request, connection)
            finally:
                self._now -= 1
                connection.close()
