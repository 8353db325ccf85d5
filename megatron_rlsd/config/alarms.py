"""Thresholds of the alarms: what a run measures of its own soundness."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_rlsd.config.section import Section


class AlarmsConfig(Section):
    """A measure beyond its ``_warn`` warns; beyond its ``_stop`` ``in_a_row`` times it stops the
    run, with its state in run_dir/bad_steps/checkpoint. null: never."""

    log_prob_diff_warn: float | None = Field(0.1, gt=0)
    log_prob_diff_stop: float | None = Field(None, gt=0)
    """Nats per token, ``train/rollout_log_prob_diff_mean``: how far the trainer's log-probabilities
    of the sampled tokens lie from the engine's. Rounding, and in asynchronous runs what the policy
    has learnt since, unless engine and trainer no longer compute the same model."""
    noise_share_warn: float | None = Field(0.25, gt=0)
    noise_share_stop: float | None = Field(None, gt=0)
    """``noise/evidence_clip_share``: the standard deviation of the gain where it is known to be 0
    (``teacher.noise_interval``), as a share of log(1 + algorithm.evidence_clip)."""
    unjudged_share_warn: float | None = Field(0.05, ge=0, le=1)
    unjudged_share_stop: float | None = Field(None, ge=0, le=1)
    """``rollout/reward_error_share``: responses that got no verdict, because a reward failed.
    ``reward.max_error_share`` also stops a run, at the first batch beyond it."""
    no_signal_warn: int | None = Field(5, ge=1)
    no_signal_stop: int | None = Field(None, ge=1)
    """Steps in a row from which nothing can be learned: all advantages or the gradient are 0, every
    response is cut at its limit, no response has the hint that the teacher needs. The warning says
    what is likely behind it and shows one response; it also comes where a shorter run has no other
    steps."""
    in_a_row: int = Field(3, ge=1)
    """Measurements beyond ``_stop``, one after another, that stop the run."""

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> AlarmsConfig:
        for name in ("log_prob_diff", "noise_share", "unjudged_share", "no_signal"):
            warn, stop = getattr(self, f"{name}_warn"), getattr(self, f"{name}_stop")
            if warn is not None and stop is not None and stop < warn:
                raise ValueError(
                    f"alarms.{name}_stop={stop:g} is below alarms.{name}_warn={warn:g}: the run "
                    "would stop before it warns"
                )
        return self
