"""Each fuzz target for some seconds, with the same inputs every time."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest

from megatron_rlsd.checkpoint import start, storage
from megatron_rlsd.data.control_text import ControlText
from megatron_rlsd.rollout.sglang import client
from megatron_rlsd.rollout.sglang.answers import raise_for_status
from tests.fuzz.driver import fuzz
from tests.fuzz.targets import TARGETS, chat_templates, checkpoint_bytes, server_replies

SECONDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_input_finds_a_fault(name: str) -> None:
    outcome = fuzz(name, TARGETS[name], seconds=SECONDS, stop_at_first=True)
    for finding in outcome.findings:
        pytest.fail(f"input {finding.number}: {finding.shown}\n{finding.trouble}")
    assert outcome.inputs


@pytest.mark.parametrize(
    ("module", "mend", "without", "only"),
    [
        (start, "verify", lambda *_: None, None),
        (storage, "_checked_reads", nullcontext, 74),
    ],
)
def test_without_its_mend_damage_to_a_checkpoint_is_trained_on(
    module: Any, mend: str, without: Any, only: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, mend, without)
    outcome = fuzz("checkpoint_bytes", checkpoint_bytes, seconds=5, only=only)
    assert any("loaded, but not what was saved" in each.trouble for each in outcome.findings)


def test_without_its_mend_a_message_writes_control_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlText, "mark", lambda self, messages: messages)
    outcome = fuzz("chat_templates", chat_templates, seconds=20, stop_at_first=True)
    assert any("a message wrote the token" in each.trouble for each in outcome.findings)


async def read_to_the_end(response: Any, where: str, max_bytes: int) -> bytes:
    return b"".join([part async for part in response.aiter_raw()])


def every_3xx_is_fine(response: Any, content: bytes, where: str, secret: str | None = None) -> None:
    if response.status_code >= 400:
        raise_for_status(response, content, where, secret)


@pytest.mark.parametrize(
    ("mend", "without", "says"),
    [
        ("received", read_to_the_end, r"Read: \d+ bytes of an answer that may have \d+"),
        ("raise_for_status", every_3xx_is_fine, r"HTTP 30\d was taken for an answer"),
    ],
)
def test_without_its_mend_a_server_is_read_without_end_or_believed(
    monkeypatch: pytest.MonkeyPatch, mend: str, without: Any, says: str
) -> None:
    monkeypatch.setattr(client, mend, without)
    outcome = fuzz("server_replies", server_replies, seconds=20, stop_at_first=True)
    assert any(re.search(says, each.trouble) for each in outcome.findings)
