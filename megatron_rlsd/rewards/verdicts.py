"""Verdicts that need not be asked for again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict

from megatron_rlsd.types import RewardInput, RewardResult

MOST = 100_000
"""Verdicts that are kept, those that were used last."""


class Verdicts:
    """What was said of each response, by all that a reward function sees of it.

    Only whole verdicts are kept: a call that failed is made again.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[bytes, RewardResult] = OrderedDict()
        self._lock = threading.Lock()

    def of(
        self,
        samples: list[RewardInput],
        score: Callable[[list[RewardInput]], list[RewardResult]],
    ) -> list[RewardResult]:
        """The results in the order of the samples; ``score`` gets those that are new, each once."""
        keys = [_key(sample) for sample in samples]
        with self._lock:  # an evaluation is scored beside a stream's responses
            results = {key: self._kept[key] for key in keys if key in self._kept}
        new = {k: s for k, s in zip(keys, samples, strict=True) if k not in results}
        if new:
            results |= dict(zip(new, score(list(new.values())), strict=True))
        with self._lock:
            for key in dict.fromkeys(keys):
                if results[key].value is not None and not results[key].errors:
                    self._kept[key] = results[key]
                    self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return [results[key] for key in keys]


def _key(sample: RewardInput) -> bytes:
    # What is not JSON is refused where the sample is scored.
    return hashlib.sha256(json.dumps(asdict(sample), default=repr).encode()).digest()
