"""Each fuzz target for some seconds, with the same inputs every time."""

from __future__ import annotations

import pytest

from tests.fuzz.driver import fuzz
from tests.fuzz.targets import TARGETS

SECONDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_input_finds_a_fault(name: str) -> None:
    outcome = fuzz(name, TARGETS[name], seconds=SECONDS, stop_at_first=True)
    for finding in outcome.findings:
        pytest.fail(f"input {finding.number}: {finding.shown}\n{finding.trouble}")
    assert outcome.inputs
