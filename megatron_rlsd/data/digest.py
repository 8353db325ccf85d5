"""A short name for content, equal where the content is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

DIGITS = 32


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits that follow from plain JSON data, and from the order of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:DIGITS]
