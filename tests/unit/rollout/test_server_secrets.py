"""A server's key is on no command line, in no log and in no message."""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.client import SGLangClient
from megatron_rlsd.rollout.sglang.launch import hidden_flags
from megatron_rlsd.rollout.sglang.process import hidden_environment, server_command
from tests.unit.rollout.stand_in import answer

KEY, URL = "sk-4711", "http://127.0.0.1:1"


def test_keys_reach_sglang_past_its_command_line_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the class that SGLang reads its command line into."""
    python = tmp_path / "python"
    python.touch()
    args = {"admin-api-key": f"{KEY}-admin", "ssl_keyfile_password": 4711, "max_total_tokens": 9}
    config = SGLangConfig(python=str(python), device="cuda", args=args)
    command = server_command(config, model="/m", dtype="bfloat16", index=0, port=30, label="l")
    assert "4711" not in " ".join(command)
    assert "--max-total-tokens 9" in " ".join(command)
    for name, value in hidden_environment(config, KEY).items():
        monkeypatch.setenv(name, value)

    class ServerArgs:
        from_cli_args = staticmethod(lambda arguments: arguments)

    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sglang.srt", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "sglang.srt.server_args", SimpleNamespace(ServerArgs=ServerArgs)
    )
    hidden_flags.take()
    assert hidden_environment(SGLangConfig(), None) == {}
    known = argparse.Namespace(api_key=None, admin_api_key=None, ssl_keyfile_password=None)
    read = ServerArgs.from_cli_args(known)
    assert (read.api_key, read.admin_api_key) == (KEY, f"{KEY}-admin")
    assert read.ssl_keyfile_password == "4711"
    assert f"Bearer {read.api_key}" == f"Bearer {KEY}"
    assert "4711" not in f"server_args={vars(read)}"
    # So it goes to SGLang's processes, which may print it, too.
    assert "4711" not in repr(pickle.loads(pickle.dumps(vars(read))))
    assert hidden_flags.VARIABLE not in os.environ
    with pytest.raises(SystemExit, match="has no flag --admin-api-key"):
        ServerArgs.from_cli_args(argparse.Namespace(api_key=None))


def broken_off() -> httpx2.Response:
    raise httpx2.RemoteProtocolError(f"illegal header Bearer {KEY}")


@pytest.mark.parametrize(
    "reply",
    [
        lambda: answer({"error": f"invalid key {KEY}"}, 401),
        lambda: answer({"error": {"message": "x" * 497 + KEY}}, 500),
        lambda: answer(f"<p>Authorization: Bearer {KEY}</p>".encode(), 403),
        lambda: answer(None, 302, {"Location": f"http://login/?key={KEY}"}),
        lambda: answer(f"<p>{KEY}</p>".encode()),
        # As SGLang's /server_info does; the other facts are missing.
        lambda: answer({"api_key": KEY}),
        broken_off,
    ],
    ids=["401", "500", "a page", "a redirection", "no JSON", "facts", "broken off"],
)
def test_a_message_of_the_client_does_not_repeat_its_key(
    reply: Callable[[], httpx2.Response],
) -> None:
    seen = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["Authorization"])
        return reply()

    async def ask() -> Any:
        client = SGLangClient(URL, api_key=KEY, max_connections=1)
        client._http = httpx2.AsyncClient(
            transport=httpx2.MockTransport(handle), base_url=URL, headers=client._http.headers
        )
        try:
            await client.call("GET", "/server_info", timeout=10)
            return await client.facts(timeout=10)
        finally:
            await client.close()

    with pytest.raises(EngineError, match=URL) as error:
        asyncio.run(ask())
    assert set(seen) == {f"Bearer {KEY}"}
    assert KEY[:4] not in str(error.value)
