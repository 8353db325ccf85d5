"""Episodes over HTTP: each turn continues the very ids that the trajectory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience.episodes import Episodes
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import SamplingParams
from tests.environment_runs import DIGITS
from tests.sglang.conftest import Publisher


def test_the_models_tokens_have_the_probabilities_of_the_whole_trajectory(
    published: Publisher,
    engine: SGLangEngine,
    make_config: Callable[..., Config],
    tiny_model: Path,
    tmp_path: Path,
    stop_token_ids: tuple[int, ...],
) -> None:
    (tmp_path / "digits.py").write_text(DIGITS)
    config = make_config(
        environment={
            "name": f"{tmp_path}/digits.py:Digits",
            "workers": 1,
            "max_turns": 3,
            "max_turn_tokens": 8,
        }
    )
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
    problems = build_sources(config.data.train, 0).next(3)
    with EnvironmentPool(config.environment) as pool:
        episodes = Episodes(config, prompts, tokenizer, engine, pool)
        params = SamplingParams(160, 1.0, stop_token_ids=stop_token_ids)
        found = episodes.play(problems, 4, params, ["0", "1", "2"])
    assert max(len(t.transcript) for t in found) == 5
    for trajectory in found:
        generation = trajectory.generation
        assert not trajectory.environment_error
        own = torch.tensor(
            generation.loss_mask.tolist()
            if generation.loss_mask is not None
            else [True] * len(generation.token_ids),
            dtype=torch.bool,
        )
        expected = published.reference.log_probs(
            trajectory.prompt_ids.tolist(), generation.token_ids.tolist(), 1.0
        )
        measured = torch.tensor(generation.log_probs.tolist())
        torch.testing.assert_close(measured[own], expected[own], atol=1e-4, rtol=0)
        assert not measured[~own].any()
        assert generation.weight_version == published.version
