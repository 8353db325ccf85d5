"""Odd text, and small changes to text, for the targets to build their inputs from."""

from __future__ import annotations

import random
from collections.abc import Sequence

ODD = (
    *("", " ", "\n", "\t", "\r\n", "\u2028", "\x00", "\ufeff"),
    *("é", "e\u0301", "🙂", "٣", "²", "中"),
    *("'", '"', "\\", "#", " #", ": ", "- ", "@", "*", "&", "!", "%", "`", "|", ">", "?", "~"),
    *("[", "]", "{", "}", ",", "=", "<<", "null", "true", "no", "1e5", "0x1f", "1_0", "12:30"),
    *(".5", "-0", "2026-11-26", "NaN", "Infinity", "9" * 40),
    *("../..", "$HOME", "{answer}", "<|im_end|>", "</s>"),
)


def text(rng: random.Random, pieces: Sequence[str] = (), length: int = 4) -> str:
    """Up to ``length`` pieces, odd ones among them, side by side."""
    return "".join(
        rng.choice(pieces) if pieces and rng.random() < 0.6 else rng.choice(ODD)
        for _ in range(rng.randint(0, length))
    )


def mutated(rng: random.Random, whole: str) -> str:
    """One slip: a part left out, doubled, moved, or something odd put in."""
    start, stop = sorted(rng.randint(0, len(whole)) for _ in range(2))
    part = whole[start:stop]
    at = rng.randint(0, len(whole))
    return rng.choice(
        [
            whole[:start] + whole[stop:],
            whole[:at] + part[:20] + whole[at:],
            whole[:at] + rng.choice(ODD) + whole[at:],
            whole[:start] + part[::-1] + whole[stop:],
        ]
    )
