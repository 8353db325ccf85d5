from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rlsd.config import RewardConfig
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.types import FinishReason, Problem, RewardInput


@pytest.fixture
def sample() -> Callable[..., RewardInput]:
    def make(
        response: str,
        answer: str = "7",
        *,
        id: str = "p0",
        num_tokens: int = 10,
        max_tokens: int = 100,
        finish_reason: FinishReason = "stop",
        metadata: dict | None = None,
        turn: str | None = None,
    ) -> RewardInput:
        messages = ({"role": "user", "content": "?"},)
        problem = Problem(id=id, messages=messages, answer=answer, metadata=metadata or {})
        return RewardInput(problem, response, num_tokens, max_tokens, finish_reason, turn=turn)

    return make


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardPool]]:
    """Make a pool from names (or config entries), or from the source of a user's file."""
    pools = []
    monkeypatch.chdir(tmp_path)

    def make(
        *functions: str | dict,
        source: str | None = None,
        memory_limit_bytes: int = 1 << 30,
        **settings: object,
    ) -> RewardPool:
        entries = [{"name": f} if isinstance(f, str) else f for f in functions]
        if source is not None:
            (tmp_path / "user_rewards.py").write_text(source)
            entries = [{**e, "name": f"user_rewards.py:{e['name']}"} for e in entries]
        config = RewardConfig.model_validate({"functions": entries, "workers": 1} | settings)
        pools.append(RewardPool(config, memory_limit_bytes=memory_limit_bytes))
        return pools[-1]

    yield make
    for each in pools:
        each.close()
