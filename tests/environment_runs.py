"""An environment in which random models live varied lives, and configurations that use it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.experiments.scripted_play import play
from megatron_rlsd.config import Config, load_config
from megatron_rlsd.data import build_sources
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import ResponsesDone
from megatron_rlsd.types import Generation, GenerationRequest

CONFIGS = Path(__file__).parent.parent / "examples/configs/environments"
NAMES = ("calculator", "guessing_game")

ENDING = "aeiouAEIOU"
DIGITS = f'''
from megatron_rlsd.environments import Observation


class Digits:
    """Counts even digits; a vowel ends the episode. Answers differ in length, rewards in size."""

    def reset(self, problem):
        return "Write digits."

    def step(self, response):
        even = sum(c in "02468" for c in response)
        done = any(c in "{ENDING}" for c in response)
        return Observation("even" + "!" * len(response), done=done, reward=even / 4)
'''


TELLING = '''
def telling(sample):
    """Between 0 and 1 by what was said in all turns, which random models vary in."""
    return sum(len(m["content"]) for m in sample.transcript if m["role"] == "assistant") % 7 / 6
'''


def environment_config(name: str, run_dir: Path, model: Path, *overrides: str) -> Config:
    """examples/configs/environments/``name``.yaml, small, with a reward of the whole transcript."""
    run_dir.parent.mkdir(exist_ok=True)
    reward = run_dir.parent / "telling.py"
    reward.write_text(TELLING)
    changes = [
        f"run_dir={run_dir}",
        f"model.hf_path={model}",
        "rollout.prompts_per_step=2",
        "rollout.max_response_tokens=60",
        "environment.max_turn_tokens=10",
        "environment.workers=1",
        f"reward.functions=[{{name: '{reward}:telling'}}, {{name: environment}}]",
        "reward.solved_threshold=0.5",
        "reward.workers=1",
        "train.max_tokens_per_microbatch=512",
        "train.record_steps=all",
        "observability.tensorboard=false",
        "observability.progress=none",
        "distributed.timeout_seconds=60",
    ]
    return load_config(CONFIGS / f"{name}.yaml", [*changes, *overrides])


def digits_config(run_dir: Path, model: Path, *overrides: str) -> Config:
    """RLSD in the environment above, whose own reward is the only one."""
    file = run_dir.parent / "digits.py"
    file.write_text(DIGITS)
    return environment_config(
        "guessing_game",
        run_dir,
        model,
        f"environment.name='{file}:Digits'",
        "environment.params={}",
        "environment.max_turns=3",
        "reward.functions=[{name: environment}]",
        "algorithm.lambda_decay_steps=0",
        "train.steps=1",
        *overrides,
    )


def conversations_config(run_dir: Path, model: Path, *overrides: str) -> Config:
    """A supervised warm start on twelve scripted guessing games, a third of them privileged."""
    config = environment_config("guessing_game", run_dir, model)
    chance = random.Random(0)
    games = [
        play(config, problem, chance, noise=0.5, privileged=number % 3 == 0)[0]
        for number, problem in enumerate(build_sources(config.data.train, 0).next(12))
    ]
    path = run_dir.parent / "games.jsonl"
    path.write_text("".join(json.dumps(game) + "\n" for game in games))
    return environment_config(
        "guessing_game",
        run_dir,
        model,
        f"data.train=[{{kind: jsonl, path: '{path}'}}]",
        "environment.max_turn_tokens=24",
        "rollout.max_response_tokens=160",
        "sft.steps=2",
        "sft.batch_size=12",
        *overrides,
    )


class RecordingEngine:
    """A real engine that also keeps what it was asked and what it gave."""

    on_progress: ResponsesDone | None = None

    def __init__(self, model: Path) -> None:
        self.engine = EmbeddedEngine(model, torch.float32, 64)
        self.weight_version = 0
        self.batches: list[list[tuple[GenerationRequest, Generation]]] = []

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        found = [replace(g, token_ids=g.token_ids.copy()) for g in self.engine.generate(requests)]
        self.batches.append(list(zip(requests, map(replace, found), strict=True)))
        return found


def check_rows(
    rows: list[Any],
    batches: list[list[tuple[GenerationRequest, Generation]]],
    *,
    complete: bool = True,
) -> None:
    """Every turn in a row is one that the engine gave, for exactly the tokens before it, in no
    other row; and with ``complete`` no turn that it gave is missing.

    rows: with prompt_ids, response_ids, loss_mask, rollout_log_probs and weight_versions as lists.
    """
    given: dict[tuple[int, ...], list[Generation]] = {}
    for request, found in (exchange for batch in batches for exchange in batch):
        given.setdefault(tuple(request.prompt_ids), []).append(found)
    for row in rows:
        own = [bool(each) for each in row.loss_mask]
        starts = [t for t, mine in enumerate(own) if mine and not (t and own[t - 1])]
        for start in starts:
            stop = next((t for t in range(start, len(own)) if not own[t]), len(own))
            ids, log_probs = row.response_ids[start:stop], row.rollout_log_probs[start:stop]
            answers = given[(*row.prompt_ids, *row.response_ids[:start])]
            (turn,) = [
                each
                for each in answers
                if each.token_ids.tolist() == ids
                and np.array_equal(each.log_probs, np.float32(log_probs))
                and set(row.weight_versions[start:stop]) == {each.weight_version}
            ][:1]
            answers.remove(turn)
    assert not complete or not any(given.values())
