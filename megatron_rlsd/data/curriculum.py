"""Which questions have become easy, and whether one's turn is passed over."""

from __future__ import annotations

import base64
import hashlib
import random
import zlib

import numpy as np

from megatron_rlsd.config import CurriculumConfig
from megatron_rlsd.types import Problem

KEY_BYTES = 8


class EasyQuestions:
    """The questions whose samples were solved when they were last asked."""

    def __init__(self, config: CurriculumConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._easy: set[int] = set()

    def __len__(self) -> int:
        return len(self._easy)

    def answered(self, problem: Problem, solved_share: float) -> None:
        """Take note of a question's last answers."""
        threshold = self._config.easy_threshold
        if threshold is not None and solved_share >= threshold:
            self._easy.add(_key(problem))
        else:
            self._easy.discard(_key(problem))

    def passes_over(self, problem: Problem, turn: str) -> bool:
        """Is the question not asked at this turn? The answer follows from seed, ``turn`` and what
        was answered before."""
        if _key(problem) not in self._easy:
            return False
        chance = random.Random(f"easy/{self._seed}/{turn}").random()
        return chance >= self._config.easy_fraction

    def state(self) -> str:
        """All of it as text: at most 8 bytes for each easy question, before base64."""
        keys = np.array(sorted(self._easy), np.uint64).tobytes()
        return base64.b64encode(zlib.compress(keys)).decode()

    def load_state(self, state: str) -> None:
        keys = np.frombuffer(zlib.decompress(base64.b64decode(state)), np.uint64)
        self._easy = {int(key) for key in keys}


def curriculum_of(config: CurriculumConfig | None, seed: int) -> EasyQuestions | None:
    """None where no question is ever easy."""
    if config is None or config.easy_threshold is None:
        return None
    return EasyQuestions(config, seed)


def _key(problem: Problem) -> int:
    name = f"{problem.source}\0{problem.id}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:KEY_BYTES], "little")
