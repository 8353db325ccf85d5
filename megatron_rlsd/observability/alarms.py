"""Alarms: measures of a run's own soundness that go beyond what the configuration allows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_rlsd.config import AlarmsConfig
from megatron_rlsd.runtime.warn import warn


@dataclass(frozen=True)
class Measure:
    """One metric that is watched."""

    name: str
    """The keys of its thresholds in ``alarms``, without ``_warn`` and ``_stop``."""
    metric: str
    says: str
    """What a value means."""
    likely: str
    """What may be behind it."""


MEASURES = (
    Measure(
        name="log_prob_diff",
        metric="train/rollout_log_prob_diff_mean",
        says="the trainer's log-probabilities of the sampled tokens differ from the engine's by "
        "{:.3g} nats on average",
        likely="other weights, precision or sampling settings in the engine, or with asynchronous "
        "rollouts responses that are too old; algorithm.tis corrects a moderate difference",
    ),
    Measure(
        name="noise_share",
        metric="noise/evidence_clip_share",
        says="under identical prompts, where the gain is 0, its standard deviation is {:.3g} of "
        "log(1 + algorithm.evidence_clip), so that credit of single tokens is partly noise",
        likely="a low precision (model.dtype, model.precision) or a small algorithm.evidence_clip",
    ),
    Measure(
        name="unjudged_share",
        metric="rollout/reward_error_share",
        says="a share of {:.3g} of the responses has no verdict, because a reward function failed",
        likely="an error or a time limit of the function (reward.timeout_seconds); the samples "
        "name it under reward_errors",
    ),
)


class Alarms:
    """Looks at each step's metrics; on rank 0, where all of them are."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._warned: set[str] = set()
        self._in_a_row: Counter[str] = Counter()

    def check(self, step: int, metrics: dict[str, float]) -> str | None:
        """Warn of measures that have gone beyond their thresholds; why the run should stop.

        A measure that stays beyond its threshold is warned of once, until it has come back. One
        that a step did not take is left as it was.
        """
        reasons = []
        for measure in MEASURES:
            if (value := metrics.get(measure.metric)) is None:
                continue
            if self._passes(measure, "warn", value):
                if measure.name not in self._warned:
                    self._warned.add(measure.name)
                    warn(
                        f"step {step}: {measure.says.format(value)}, which is more than "
                        f"alarms.{measure.name}_warn={self._threshold(measure, 'warn'):g}; "
                        f"likely: {measure.likely}"
                    )
            else:
                self._warned.discard(measure.name)
            if not self._passes(measure, "stop", value):
                self._in_a_row[measure.name] = 0
                continue
            self._in_a_row[measure.name] += 1
            if self._in_a_row[measure.name] >= self._config.in_a_row:
                reasons.append(
                    f"{measure.says.format(value)}, which was more than alarms.{measure.name}_stop="
                    f"{self._threshold(measure, 'stop'):g} {self._in_a_row[measure.name]} times in "
                    f"a row; likely: {measure.likely}"
                )
        return "; ".join(reasons) or None

    def _threshold(self, measure: Measure, kind: str) -> float | None:
        found: float | None = getattr(self._config, f"{measure.name}_{kind}")
        return found

    def _passes(self, measure: Measure, kind: str, value: float) -> bool:
        threshold = self._threshold(measure, kind)
        return threshold is not None and value > threshold
