"""Each fuzz target for some seconds, with the same inputs every time."""

from __future__ import annotations

import pytest

from megatron_rlsd.checkpoint import start
from megatron_rlsd.data.control_text import ControlText
from tests.fuzz.driver import fuzz
from tests.fuzz.targets import TARGETS, chat_templates, checkpoint_bytes

SECONDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_input_finds_a_fault(name: str) -> None:
    outcome = fuzz(name, TARGETS[name], seconds=SECONDS, stop_at_first=True)
    for finding in outcome.findings:
        pytest.fail(f"input {finding.number}: {finding.shown}\n{finding.trouble}")
    assert outcome.inputs


def test_without_its_mend_damage_to_a_checkpoint_is_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(start, "verify", lambda *_: None)
    outcome = fuzz("checkpoint_bytes", checkpoint_bytes, seconds=5)
    assert any("loaded, but not what was saved" in each.trouble for each in outcome.findings)


def test_without_its_mend_a_message_writes_control_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlText, "mark", lambda self, messages: messages)
    outcome = fuzz("chat_templates", chat_templates, seconds=20, stop_at_first=True)
    assert any("a message wrote the token" in each.trouble for each in outcome.findings)
