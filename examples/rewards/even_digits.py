"""A reward for trying out a set-up: a model that knows nothing earns some of it."""

from megatron_rlsd.types import RewardInput


def even_digits(sample: RewardInput) -> float:
    """Share of even digits among the digits of the response."""
    digits = [character for character in sample.response if character.isdigit()]
    return sum(character in "02468" for character in digits) / max(1, len(digits))
