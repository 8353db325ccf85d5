"""What workers are asked, and the JSON lines that ask it: no pickle, one object a line.

pool -> worker:  setup {memory_limit_bytes, ...}, then jobs {job, call, problem, ...}: make the
                 job's calls from number ``call`` on, in order.
worker -> pool:  {"ready": true} or {"fatal": what happened}; then for each call any number of
                 {job, call, progress} and {job, call, value} or
                 {job, call, error, detail, timed_out, retire}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlsd.types import Problem


class Outcomes(Protocol):
    """Who wants to know what became of calls; either method may raise to give the rest up."""

    def value(self, job: int, call: int, value: Any, /) -> None:
        """A call was answered, in the worker's own words (JSON data)."""

    def failure(self, job: int, call: int, reason: str, detail: str, timed_out: bool, /) -> None:
        """A call raised, took too long or ended its worker. ``detail``: a traceback, or what the
        worker wrote last."""


@dataclass
class Job:
    """One or more calls about a problem, which one worker answers in order."""

    number: int
    """Its name among those of the same ``outcomes``."""
    problem: Problem
    request: dict[str, Any]
    """What else the worker has to know; JSON data."""
    outcomes: Outcomes
    calls: int = 1
    next_call: int = 0
    """The first call without an outcome."""

    def line(self) -> bytes:
        """Raises TypeError or ValueError where the problem's metadata is not JSON."""
        return encode(
            {
                "job": self.number,
                "call": self.next_call,
                "problem": vars(self.problem),
                **self.request,
            }
        )


def encode(message: dict[str, Any]) -> bytes:
    """One line; ASCII, so that neither line breaks nor lone surrogates of a response disturb it."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"
