"""A run that learns nothing says so: which steps have no signal, and what is likely behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rlsd.config import Config
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Group

SHOWN_CHARACTERS = 300
"""The most characters of a sample's question and response."""
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Lack:
    """Something without which a step teaches nothing, or not what it is meant to."""

    name: str
    says: str
    """What it means if all steps are like this."""


NO_ADVANTAGE = Lack("advantages", "nothing is learned: every response has advantage 0")
ALL_TRUNCATED = Lack("truncated", "every response was cut at its length limit")
NO_HINT = Lack("hints", "no response had a hint, so the teacher says nothing")
NO_GRADIENT = Lack("gradient", "nothing is learned: the gradient is 0")


class SignalWatch:
    """Looks at each step's metrics and responses; on rank 0, where all of them are."""

    def __init__(self, config: Config, total_steps: int) -> None:
        self._config, self._total_steps = config, total_steps
        self._first_step: int | None = None
        self._in_a_row: dict[str, int] = {}
        self._warned: set[str] = set()

    def check(self, step: int, metrics: Metrics, groups: Sequence[Group] = ()) -> str | None:
        """Warn once there have been ``alarms.no_signal_warn`` steps in a row that lack something,
        or as many as the run has; why the run should stop, with ``alarms.no_signal_stop``.

        Each lack is warned of once, until a step has what was missing. ``groups``: the step's, of
        which one response is shown; empty in supervised training.
        """
        if self._first_step is None:
            self._first_step = step
        lacks = self._lacks(metrics)
        self._warned &= {each.name for each in lacks}
        self._in_a_row = {each.name: self._in_a_row.get(each.name, 0) + 1 for each in lacks}
        settings, reason = self._config.alarms, None
        for lack in lacks:
            count = self._in_a_row[lack.name]
            over = step + 1 >= self._total_steps and count == step + 1 - self._first_step
            text = f"{lack.says}, for {count} steps now; likely: {self._likely(lack, metrics)}"
            many = settings.no_signal_warn is not None and count >= settings.no_signal_warn
            if (many or (over and settings.no_signal_warn)) and lack.name not in self._warned:
                self._warned.add(lack.name)
                warn(f"step {step}: {text}{one_sample(groups)}")
            if settings.no_signal_stop is not None and count >= settings.no_signal_stop:
                reason = reason or text
        return reason

    def _lacks(self, metrics: Metrics) -> list[Lack]:
        algorithm, found = self._config.algorithm, []
        if metrics.get("rollout/zero_advantage_share") == 1 and not algorithm.scores_every_response:
            found.append(NO_ADVANTAGE)
        if metrics.get("rollout/truncated_share") == 1 and NO_ADVANTAGE not in found:
            found.append(ALL_TRUNCATED)
        teaches = algorithm.scores_every_response or metrics.get("algorithm/lambda")
        hinted = self._config.teacher.hint != "none"
        if teaches and hinted and metrics.get("teacher/without_hint_share") == 1:
            found.append(NO_HINT)
        if metrics.get("train/grad_norm") == 0 and NO_ADVANTAGE not in found:
            found.append(NO_GRADIENT)
        return found

    def _likely(self, lack: Lack, metrics: Metrics) -> str:
        config = self._config
        limit = f"rollout.max_response_tokens={config.rollout.max_response_tokens}"
        if lack is ALL_TRUNCATED:
            return f"{limit} is too small, or the model never ends its turn (tokenizer, template)"
        if lack is NO_HINT:
            return HINT_CAUSES[config.teacher.hint]
        if lack is NO_GRADIENT:
            return "no token is trained on, or all have weight 0 (loss masks, coefficients)"
        if metrics.get("rollout/reward_error_share") == 1:
            return "the reward fails on every response; samples/ names its errors"
        if metrics.get("rollout/truncated_share") == 1:
            return f"every response was cut at {limit} before it gave an answer"
        for function in config.reward.functions:
            if function.name == "format" and metrics.get("reward/format") == 0:
                return "no response has the form that the reward format asks for"
        first = config.reward.correctness_label
        solved = metrics.get("rollout/solved_share")
        if solved == 1:
            return "every response is right: the questions are too easy for this model"
        if solved == 0 and metrics.get("rollout/reward_std") == 0:
            return (
                f"no response is right for {first}: the questions are too hard for this model, the "
                "prompt does not ask for the form that the reward reads, or its answers are wrong; "
                "rlsd doctor tries the reward"
            )
        return (
            "the responses to each question have the same reward, however questions differ: a "
            "higher rollout.temperature or more rollout.n_samples_per_prompt makes them differ"
        )


HINT_CAUSES = {
    "reference_solution": "the problems have neither reference_solution nor answer",
    "answer": "the problems have no answer",
    "own_correct_response": "no question had another solved response, which is the hint",
    "own_correct_or_reference": "no question had another solved response, and the problems have "
    "neither reference_solution nor answer",
    "critique": "no problem has a text under teacher.critique_key",
}
"""teacher.hint -> why there may be none."""


def one_sample(groups: Sequence[Group]) -> str:
    """A question, a response to it and its reward, as further lines; empty without groups."""
    for group in groups:
        for trajectory in group.trajectories:
            question = group.problem.messages[-1]["content"] if group.problem.messages else ""
            result = trajectory.reward
            reward = result.value if result is not None else None
            lines = {
                "question": _short(question, keep_end=True),
                "response": _short(trajectory.told),
                "answer": _short(group.problem.answer),
                "reward": "none" if reward is None else f"{reward:g}",
            }
            if result is not None and result.errors:
                lines["error"] = _short("; ".join(result.errors.values()))
            ended = trajectory.generation.finish_reason
            return "\n  one of them:" + "".join(
                f"\n    {name:<9} {text}" for name, text in {**lines, "ended by": ended}.items()
            )
    return ""


def _short(text: str, *, keep_end: bool = False) -> str:
    """On one line, without what a terminal would act on."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = "..." + text[-SHOWN_CHARACTERS:] if keep_end else f"{text[:half]} ... {text[-half:]}"
    return repr(text)
