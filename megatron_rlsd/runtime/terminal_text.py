"""Text of models, users and servers on its way to a terminal or a log, which acts on none of it."""

from __future__ import annotations

import re

# Control characters but newline and tab; line separators; what turns the direction of the text
# around it; and halves of characters, which no terminal can be given.
ACTED_ON = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with every character that a terminal would act on written out, as in ``\x1b``."""
    return ACTED_ON.sub(lambda found: ascii(found[0])[1:-1], text)
