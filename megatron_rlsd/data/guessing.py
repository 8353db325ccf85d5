"""Problems of the number guessing game: item i follows from (low, high, seed, i) alone."""

from __future__ import annotations

import random

from megatron_rlsd.config import GuessingGameSource
from megatron_rlsd.data.digest import digest_of
from megatron_rlsd.types import Problem


class GuessingProblems:
    """One secret number a problem; ``metadata["guessing_game"]`` = {low, high, secret}.

    The reference solution is the line of guesses that halves what is left, with the answers to
    each: what a player who knows nothing should do, and how it ends.
    """

    def __init__(self, source: GuessingGameSource) -> None:
        self.name = source.name or "guessing_game"
        self._source = source
        self.digest = digest_of(source.low, source.high, source.seed, source.size)

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, index: int, /) -> Problem:
        low, high = self._source.low, self._source.high
        secret = random.Random(f"guessing_game/{self._source.seed}/{index}").randint(low, high)
        return Problem(
            id=f"guessing_game/{index}",
            messages=({"role": "user", "content": question(low, high)},),
            answer=str(secret),
            reference_solution=halving_line(low, high, secret),
            metadata={"guessing_game": {"low": low, "high": high, "secret": secret}},
            source=self.name,
        )

    def notes(self) -> list[str]:
        return []


def question(low: int, high: int) -> str:
    """The rules, without the form of a guess, which is the environment's affair."""
    return (
        f"I am thinking of a whole number from {low} to {high}. Guess it: after each guess I say "
        "whether my number is higher or lower."
    )


def halving_line(low: int, high: int, secret: int) -> str:
    """``50: lower``, ``25: higher`` ... ``37: correct``, a line each; low <= secret <= high."""
    lines: list[str] = []
    while True:
        guess = (low + high) // 2
        if guess == secret:
            return "\n".join([*lines, f"{guess}: correct"])
        if guess < secret:
            low = guess + 1
            lines.append(f"{guess}: higher")
        else:
            high = guess - 1
            lines.append(f"{guess}: lower")
