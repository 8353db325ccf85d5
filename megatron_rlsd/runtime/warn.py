"""Warnings to whoever runs this: said once, and kept by the run that they belong to."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("megatron_rlsd")


def warn(text: str, *values: object) -> None:
    """Warn of ``text % values``: a run shows it and keeps it in warnings.jsonl.

    Outside a run it goes to standard error.
    """
    # Libraries that configure logging switch off the loggers that are there.
    LOGGER.disabled = False
    LOGGER.warning(text, *values)
