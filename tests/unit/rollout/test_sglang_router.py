"""A router in place of a server is refused with the URLs to give instead."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.client import SGLangClient

WORKERS = {
    # What sglang-router 0.3.2 answered, in front of two servers, shortened.
    "workers": [
        {"id": "cc342534", "url": "http://127.0.0.1:18881", "is_healthy": True, "load": 0},
        {"id": "1f0f52a1", "url": "http://127.0.0.1:18882", "is_healthy": True, "load": 0},
    ]
}


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """The URL of a program that knows these paths, and answers 404 to all others, as it does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers[self.path]).encode() if self.path in answers else b""
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ready(url: str) -> None:
    async def ask() -> None:
        client = SGLangClient(url, api_key=None, max_connections=2)
        try:
            await client.ready(timeout=10)
        finally:
            await client.close()

    asyncio.run(ask())


def test_a_router_is_refused_with_its_servers() -> None:
    servers = r"\[http://127\.0\.0\.1:18881, http://127\.0\.0\.1:18882\]"
    with (
        answering({"/workers": WORKERS, "/readiness": {"status": "ready"}}) as url,
        pytest.raises(EngineError, match=rf"is a router, .*rollout\.sglang\.urls: {servers}"),
    ):
        ready(url)


def test_a_server_is_ready_and_what_is_neither_is_told_as_it_is() -> None:
    with answering({"/ready": {}}) as url:
        ready(url)
    with answering({}) as url, pytest.raises(EngineError, match="/ready: HTTP 404"):
        ready(url)
