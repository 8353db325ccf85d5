"""Warnings to whoever runs this: said once, and kept by the run that they belong to."""

from __future__ import annotations

import logging

from megatron_rlsd.runtime.terminal_text import visible

LOGGER = logging.getLogger("megatron_rlsd")


def warn(text: str, *values: object) -> None:
    """Warn of ``text % values``: a run shows it and keeps it in warnings.jsonl, both as
    ``visible`` writes it.

    Outside a run it goes to standard error.
    """
    # Libraries that configure logging switch off the loggers that are there.
    LOGGER.disabled = False
    LOGGER.warning("%s", visible(text % values if values else text))
