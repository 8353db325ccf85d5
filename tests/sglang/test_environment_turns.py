"""Episodes over HTTP: each turn continues the very ids that the trajectory holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, build_sources, load_tokenizer
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience.episodes import Episodes
from megatron_rlsd.experience.playing import BackgroundPlayer, open_player
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.rollout.sglang.calls import versions_of
from megatron_rlsd.types import SamplingParams
from tests.agent_files import CHANGING
from tests.environment_runs import DIGITS
from tests.sglang.conftest import Publisher, Reference
from tests.tool_models import SHORT


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


def test_agents_turns_have_the_probabilities_of_the_weights_that_they_name(
    published: Publisher,
    engine: SGLangEngine,
    make_config: Callable[..., Config],
    tiny_model: Path,
    tmp_path: Path,
    stop_token_ids: tuple[int, ...],
) -> None:
    """Contexts that change, and an update of the weights while the agents ask."""
    (tmp_path / "agent.py").write_text(CHANGING)
    config = make_config(
        environment={
            "name": "openai_sessions",
            "sessions": {"agent": f"{tmp_path}/agent.py:change", "batch_wait_seconds": 0.05},
            "workers": 1,
            "max_turn_tokens": 8,
            "timeout_seconds": 60,
            "on_error": "stop",
        },
        prompts={"format_instruction": ""},
        tokenizer={"chat_template": SHORT},
    )
    before, earlier = copy.deepcopy(published.reference.model), published.version
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
    problems = build_sources(config.data.train, 0).next(2)
    with open_player(config, prompts, tokenizer, engine, engine.submit_requests) as player:
        assert isinstance(player, BackgroundPlayer)
        player.wait_until_ready()
        params = SamplingParams(160, 1.0, stop_token_ids=stop_token_ids)
        future = player.submit(problems, 2, params, ["0", "1"])
        published.publish_new()
        found = future.result(120)
    assert [len(trajectory.rows) for trajectory in found] == [5] * 4
    models = {earlier: before, published.version: published.reference.model}
    for row in (row for trajectory in found for row in trajectory.rows):
        generation = row.generation
        own = torch.ones(len(generation.token_ids), dtype=torch.bool)
        if generation.loss_mask is not None:
            own = torch.from_numpy(generation.loss_mask)
        versions = torch.from_numpy(versions_of(generation))
        assert set(versions.tolist()) <= models.keys()
        measured = torch.from_numpy(generation.log_probs)
        for version, model in models.items():
            expected = Reference.of(model).log_probs(
                row.prompt_ids.tolist(), generation.token_ids.tolist(), 1.0
            )
            mine = own & (versions == version)
            torch.testing.assert_close(measured[mine], expected[mine], atol=1e-4, rtol=0)
