from __future__ import annotations

import logging

import pytest

from megatron_rlsd.observability.display import Display, PlainDisplay
from megatron_rlsd.observability.no_signal import one_sample
from megatron_rlsd.observability.run_warnings import RunWarnings, read_warnings
from megatron_rlsd.runtime.errors import UserError, tell
from megatron_rlsd.runtime.terminal_text import visible
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Generation, Group, Problem
from tests.batches import trajectory

EVIL = "a\x1b]0;owned\x07\x9b2J\r\u202eb\ud800"
SEEN = r"a\x1b]0;owned\x07\x9b2J\r\u202eb\ud800"


def test_what_a_terminal_acts_on_is_written_out_and_all_else_stays() -> None:
    assert visible(EVIL) == SEEN
    assert visible(visible(EVIL)) == SEEN
    for text in ("line\n\tline", "é中🙂", "👩\u200d🔬", "a\\x1b", "\xa0\xad"):
        assert visible(text) == text
    acts = [chr(code) for code in range(0x10000) if visible(chr(code)) != chr(code)]
    assert all(not each.isprintable() for each in acts)
    assert {"\x00", "\x08", "\x1b", "\x7f", "\x90", "\u2028", "\u2067"} <= set(acts)


def test_errors_warnings_and_lines_of_a_run_are_written_out(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(UserError(EVIL))
    display = PlainDisplay()
    display.warn(EVIL)
    Display().warn(EVIL)
    problem = Problem(EVIL, ({"role": "user", "content": EVIL},), EVIL)
    group = Group(problem, [trajectory(problem, Generation.of([5], [-1.0], "length", 0), EVIL)])
    path = tmp_path / "warnings.jsonl"
    with RunWarnings(path, display.warn, lambda: 3):
        warn("of %s%s", EVIL, one_sample([group]))
        # As a plug-in does.
        logging.getLogger("megatron_rlsd.other").warning("100 %% of %s", EVIL)
    shown = capsys.readouterr()
    assert visible(shown.out + shown.err) == shown.out + shown.err
    assert (shown.out + shown.err).count(SEEN) == 5 + 3
    first, second = (each["text"] for each in read_warnings(path))
    assert first.startswith(f"of {SEEN}\n  one of them:\n")
    assert second == f"100 % of {SEEN}"
