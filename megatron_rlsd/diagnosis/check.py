"""What a check found, and how checks are run so that none ends the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_rlsd.runtime.errors import UserError

Status = Literal["ok", "warning", "failed", "skipped"]


class Doubt(Exception):
    """A check found something that a run may survive."""


class Skip(Exception):
    """A check could not be made, or does not apply; the message says why."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    message: str
    seconds: float = 0.0


def run_check(name: str, work: Callable[[], str]) -> Check:
    """``work`` returns what was found to be in order, or raises; other than UserError by type."""
    start = time.monotonic()
    status: Status
    try:
        status, message = "ok", work()
    except Skip as reason:
        status, message = "skipped", str(reason)
    except Doubt as reason:
        status, message = "warning", str(reason)
    except Exception as error:
        known = isinstance(error, UserError)
        status, message = "failed", str(error) if known else f"{type(error).__name__}: {error}"
    return Check(name, status, message, time.monotonic() - start)
