"""A verifier that errs: the right verdict on the answer, inverted for a share of the responses."""

import hashlib
import re

from megatron_rlsd.types import RewardInput


def flipped(sample: RewardInput, pattern: str, share: float) -> float:
    """1.0 or 0.0; which responses are judged wrongly is fixed by problem and response."""
    found = re.findall(pattern, sample.response)
    right = bool(found) and found[-1] == sample.problem.answer
    text = f"{sample.problem.id}/{sample.response}".encode()
    draw = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
    return float(right != (draw < share))
