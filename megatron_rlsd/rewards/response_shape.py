"""Rewards on a response's form and length, whatever its answer."""

from __future__ import annotations

import re

from megatron_rlsd.rewards.answers import compile_pattern
from megatron_rlsd.rewards.registry import register_reward
from megatron_rlsd.types import RewardInput


def _check_format(pattern: str) -> None:
    compile_pattern(pattern)


@register_reward("format", check=_check_format)
def format_reward(sample: RewardInput, pattern: str) -> float:
    """1.0 if the whole response matches the regular expression and ended by itself; else 0.0.

    So does the whole turn, with what the chat template wrote at its beginning and with special
    tokens: ``<think>`` may be either. A dot matches no line break unless the pattern begins with
    ``(?s)``.
    """
    complete = sample.finish_reason == "stop"
    return float(complete and any(re.fullmatch(pattern, text) for text in sample.texts))


def _check_length(buffer_tokens: int) -> None:
    if not isinstance(buffer_tokens, int) or buffer_tokens < 1:
        raise ValueError(f"buffer_tokens must be an integer >= 1, got {buffer_tokens!r}")


@register_reward("length", check=_check_length)
def length_penalty(sample: RewardInput, buffer_tokens: int) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), in [-1, 0].

    0 up to max_tokens - buffer_tokens, from there falling linearly to -1 at max_tokens; a response
    that was cut off gets -1.
    """
    if buffer_tokens > sample.max_tokens:
        raise ValueError(
            f"buffer_tokens={buffer_tokens} is more than the limit of {sample.max_tokens} tokens"
        )
    if sample.finish_reason == "length":
        return -1.0
    excess = sample.num_tokens - (sample.max_tokens - buffer_tokens)
    return -min(max(excess / buffer_tokens, 0.0), 1.0)
