"""Whole numbers rounded to multiples."""

from __future__ import annotations


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple
