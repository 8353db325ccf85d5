"""Whole runs on two processes, against the same run on one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from tests.distributed.ranks import next_world, run_on_ranks

LAYOUTS = {
    "one": (),
    "data": (),
    "tensor": ("parallel.tensor=2", "parallel.sequence=true"),
    "context": ("parallel.context=2",),
    "pipeline": ("parallel.pipeline=2",),
}
Run = tuple[Callable[[Config], Any], Config]
"""A program and what it is given."""


def run_on_one_and_two(on_one: list[Run], on_two: list[Run]) -> None:
    """Those on one process here; the others one after the other in the same two processes."""
    for program, config in on_one:
        program(config)
    run_on_ranks(run_all, 2, on_two, seconds=400, worlds=len(on_two) + 1)


def run_all(runs: list[Run]) -> None:
    """On every rank."""
    for program, config in runs:
        program(config)
        next_world()


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of each update."""
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line]


def assert_same_two_steps(
    expected: list[dict[str, float]],
    measured: list[dict[str, float]],
    *,
    counts: Iterable[str],
    compared: Iterable[str],
) -> None:
    """``compared`` to 1e-5 in the first step, ``counts`` to the last digits in both."""
    assert len(expected) == len(measured) == 2
    # The second step starts from weights that rounding has already moved.
    for one, other, tolerance in zip(expected, measured, (1e-5, 1e-3), strict=True):
        for key in counts:
            assert other[key] == pytest.approx(one[key]), key
        for key in compared:
            assert other[key] == pytest.approx(one[key], rel=tolerance, abs=1e-6), key
