"""Alarms sound when a measure goes too far, and end a run only where that is asked for."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megatron_rlsd.config import AlarmsConfig, parse_config
from megatron_rlsd.observability.alarms import MEASURES, Alarms
from megatron_rlsd.runtime.errors import UserError

DIFF = "train/rollout_log_prob_diff_mean"


def series(alarms: Alarms, metric: str, values: list[float | None]) -> list[str | None]:
    """What each step's check returns; None: the step did not take the measure."""
    steps: list[dict[str, float]] = [{} if v is None else {metric: v} for v in values]
    return [alarms.check(step, metrics) for step, metrics in enumerate(steps)]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_measure_warns_once_until_it_has_come_back(
    measure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    warn = getattr(AlarmsConfig(), f"{measure.name}_warn")
    values = [warn, 2 * warn, None, 3 * warn, 0.5 * warn, 2 * warn]
    with caplog.at_level(logging.WARNING):
        assert series(Alarms(AlarmsConfig()), measure.metric, values) == [None] * 6
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in told] == ["step 1", "step 5"]
    assert all(f"alarms.{measure.name}_warn={warn:g}" in text for text in told)
    assert f"{2 * warn:.3g}" in told[0]


def test_a_run_stops_after_as_many_measurements_in_a_row_as_are_asked_for() -> None:
    config = AlarmsConfig(log_prob_diff_stop=0.5, in_a_row=2)
    found = series(Alarms(config), DIFF, [0.6, 0.4, 0.6, None, 0.7, 0.1])
    assert [reason is not None for reason in found] == [False] * 4 + [True, False]
    assert "alarms.log_prob_diff_stop=0.5 2 times in a row" in str(found[4])
    never = AlarmsConfig(log_prob_diff_warn=None)
    assert series(Alarms(never), DIFF, [9.0] * 9) == [None] * 9


def settings(**sections: Any) -> dict[str, Any]:
    return {
        "run_dir": "unused",
        "model": {"hf_path": "unused"},
        "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
        "reward": {"functions": [{"name": "exact_match"}]},
        **sections,
    }


def test_thresholds_are_checked_and_the_old_key_is_taken() -> None:
    with pytest.raises(UserError, match=r"noise_share_stop=0\.1 is below alarms\.noise_share_warn"):
        parse_config(settings(alarms={"noise_share_stop": 0.1}))
    old = parse_config(settings(teacher={"noise_share": 0.5}))
    assert old.alarms.noise_share_warn == 0.5
    both = settings(teacher={"noise_share": 0.5}, alarms={"noise_share_warn": 0.3})
    assert parse_config(both).alarms.noise_share_warn == 0.3
