"""The number guessing game: higher, lower, correct."""

from __future__ import annotations

from megatron_rlsd.environments.protocol import Observation
from megatron_rlsd.environments.registry import register_environment
from megatron_rlsd.rewards.answers import check_answer_pattern, extract_answer, parse_number
from megatron_rlsd.types import Problem


@register_environment("guessing_game")
class GuessingGame:
    """Plays the problems of a ``guessing_game`` source, one guess a turn.

    The correct guess ends the game, with the reward 1.0 less ``turn_penalty`` for each turn before
    it, but no less than 0. ``pattern``: regular expression whose last match's group 1 is the guess.
    """

    def __init__(
        self, pattern: str = r"<guess>\s*(-?\d+)\s*</guess>", turn_penalty: float = 0.0
    ) -> None:
        check_answer_pattern(pattern)
        if not 0 <= turn_penalty <= 1:
            raise ValueError(f"turn_penalty must lie in [0, 1], got {turn_penalty!r}")
        self._pattern, self._turn_penalty = pattern, turn_penalty
        self._low = self._high = self._secret = self._turns = 0

    def reset(self, problem: Problem) -> None:
        game = problem.metadata.get("guessing_game")
        if not isinstance(game, dict) or not {"low", "high", "secret"} <= game.keys():
            raise ValueError(
                f"problem {problem.id} has no metadata['guessing_game'] with low, high and secret; "
                "this environment only plays problems of a guessing_game source"
            )
        self._low, self._high, self._secret = game["low"], game["high"], game["secret"]

    def step(self, response: str) -> Observation:
        turns_before, self._turns = self._turns, self._turns + 1
        text = extract_answer(response, self._pattern)
        guess = None if text is None else parse_number(text)
        if guess is None:
            return Observation("That is no guess.")
        if guess == self._secret:
            return Observation(done=True, reward=max(0.0, 1 - self._turn_penalty * turns_before))
        if not self._low <= guess <= self._high:
            return Observation(f"It is from {self._low} to {self._high}.")
        return Observation("higher" if guess < self._secret else "lower")
