"""The seed of one request: fixed by what it is for, so that a resumed run samples the same."""

from __future__ import annotations

import hashlib


def sample_seed(*parts: object) -> int:
    """A non-negative int64 from the run's seed, the step, the question, the sample, the turn."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
