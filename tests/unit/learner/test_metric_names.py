"""docs/guide.md has every metric of a run, and no other."""

from __future__ import annotations

import json
import math
import re

import pytest

from megatron_rlsd.actor.outcome import UpdateResult
from megatron_rlsd.learner import metrics
from megatron_rlsd.ops.stats import MAXIMA, SUMMED
from tests.conftest import ROOT

TABLES = (metrics.MEANS, metrics.FIRST_MEANS, metrics.LARGEST, metrics.FIRST_LARGEST)
NAMED = {row.name for table in TABLES for row in table}
OTHERS = ("divergence", "divergence_tokens", "replayed", "rerouted")
"""What actor.outcome adds to the sums of ops.stats."""


def documented() -> list[str]:
    text = (ROOT / "docs/guide.md").read_text()
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_the_guide_has_every_metric_of_the_golden_run_and_of_the_tables() -> None:
    golden = json.loads((ROOT / "tests/data/golden_run.json").read_text())
    written = NAMED | {name for step in golden["steps"] for name in step if "/" in name}
    patterns = [re.sub("<.*?>", "[^/]+", re.escape(name)) for name in documented()]
    assert len(patterns) > 40
    assert not [name for name in written if not any(re.fullmatch(p, name) for p in patterns)]


def test_the_guide_has_no_metric_that_the_program_does_not_name() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "megatron_rlsd").rglob("*.py"))
    # What a placeholder stands for is put together from parts.
    names = [name for name in documented() if "<" not in name]
    parts = [name.partition("/")[2] for name in names]
    assert len(parts) > 40
    assert not [part for part in parts if part not in source]


def test_every_mean_is_of_sums_that_an_update_has() -> None:
    names = {*SUMMED, *OTHERS}
    for row in (*metrics.MEANS, *metrics.FIRST_MEANS):
        assert {row.numerator, row.denominator} <= names
    for largest in (*metrics.LARGEST, *metrics.FIRST_LARGEST):
        assert largest.of in MAXIMA
        assert largest.counted in names


def result(maximum: float, **sums: float) -> UpdateResult:
    return UpdateResult(
        sums=dict.fromkeys((*SUMMED, *OTHERS), 0.0) | sums,
        maxima=dict.fromkeys(MAXIMA, maximum),
        grad_norm=1.0,
        learning_rate=1e-6,
        skipped=False,
        tokens=8,
        padding=2,
        waiting=0,
    )


def test_means_are_over_the_tokens_of_all_updates_and_missing_without_any() -> None:
    found = metrics.update_metrics(
        [
            result(0.5, tokens=3.0, ratio=3.0, rollout_tokens=2.0, rollout_diff_abs=0.5),
            result(1.5, tokens=1.0, ratio=5.0, rollout_tokens=2.0, rollout_diff_abs=9.0),
        ]
    )
    assert found["train/ratio_mean"] == 2.0
    assert found["train/ratio_max"] == 1.5
    # The engine is compared at the step's first update alone.
    assert found["train/rollout_log_prob_diff_mean"] == 0.25
    assert found["train/rollout_log_prob_diff_max"] == 0.5
    assert found["train/padding_share"] == pytest.approx(0.25)
    assert not {"train/entropy", "train/ref_kl", "algorithm/gain_abs_max"} & found.keys()
    assert all(math.isfinite(value) for value in found.values())
