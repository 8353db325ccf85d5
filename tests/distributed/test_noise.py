"""The gain under an identical prompt: rounding in float32, visible in bfloat16."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import parse_config
from megatron_rlsd.learner import Learner
from megatron_rlsd.types import TrainBatch
from tests.actors import actor_of
from tests.batches import train_row
from tests.distributed.layouts import VOCAB, save_models
from tests.distributed.ranks import next_world, run_on_ranks

CHOSEN = 5
LAMBDA = 0.5


def make_batch() -> TrainBatch:
    """Some trajectories without advantage, which the update leaves out."""
    rng = random.Random(1)

    def rows(shortest: int, longest: int) -> list[list[int]]:
        lengths = [rng.randrange(shortest, longest) for _ in range(12)]
        return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]

    prompts, responses = rows(2, 20), rows(1, 40)
    return TrainBatch.of(
        [
            train_row(
                *(prompt, response, 0.0 if i % 3 == 0 else (-1.0) ** i),
                teacher_prompt_ids=[1] * 37 + prompt,
            )
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
    )


def chosen_tokens(batch: TrainBatch) -> int:
    active = [row for row in batch.outlines if row.advantage]
    return sum(row.response_tokens for row in active[:CHOSEN])


def run_cases(cases: list[dict[str, Any]], out: str) -> None:
    """On every rank: two steps of each case; rank 0 writes their metrics to out/RANK.json."""
    found = []
    for case in cases:
        config = parse_config(
            {
                "run_dir": "unused",
                "model": {"hf_path": case["path"], "dtype": case["dtype"]},
                "parallel": case.get("parallel", {}),
                "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
                "reward": {"functions": [{"name": "exact_match"}]},
                "teacher": {
                    "mode": "live",
                    "noise_interval": 2,
                    "noise_trajectories": CHOSEN,
                },
                "optimizer": {"lr": 1e-2},
                "train": {"max_tokens_per_microbatch": 64, "global_batch_size": case.get("size")},
                "rollout": {"prompts_per_step": 3, "n_samples_per_prompt": 4},
            }
        )
        with actor_of(config, 4, seconds=60) as actor:
            learner = Learner(config, actor)
            batch = make_batch()
            steps = []
            for step in range(2):
                plan = learner.plan(batch, step, LAMBDA)
                scores = learner.score(plan)
                learner.gauge_noise(plan, scores)
                learner.update(plan, scores)
                steps.append(learner.noise.metrics())
            found.append(steps)
            rank = actor.groups.rank
        next_world()
    Path(out, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_models(tmp_path_factory.mktemp("models"))["untied"])


def measure(cases: list[dict[str, Any]], world: int, out: Path) -> list[list[dict[str, float]]]:
    run_on_ranks(
        *(run_cases, world, cases, str(out)),
        seconds=120,
        worlds=len(cases) + 1,
    )
    results = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


def check_is_noise(steps: list[dict[str, float]], low: float, high: float) -> None:
    first, second = steps
    assert second == {}, "measured every second step only"
    assert low < first["noise/gain_std"] < high
    assert first["noise/gain_abs_mean"] <= first["noise/gain_std"] <= first["noise/gain_abs_max"]
    expected = first["noise/gain_std"] / math.log(1.2)
    assert first["noise/evidence_clip_share"] == pytest.approx(expected)


def test_noise_is_rounding_in_float32_and_visible_in_bfloat16(model: str, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"path": model, "dtype": "float32"},
        {"path": model, "dtype": "bfloat16"},
        # Several updates: only the first one still has the weights that were scored.
        {"path": model, "dtype": "float32", "size": 6},
    ]
    exact, rounded, mini_batches = measure(cases, 1, tmp_path)
    tokens = chosen_tokens(make_batch())
    assert exact[0]["noise/tokens"] == rounded[0]["noise/tokens"] == tokens
    check_is_noise(exact, 1e-8, 1e-5)
    check_is_noise(rounded, 1e-4, 0.1)
    check_is_noise(mini_batches, 1e-8, 1e-5)
    assert (
        0
        < mini_batches[0]["noise/tokens"]
        < sum(row.response_tokens for row in make_batch().outlines)
    )


def test_every_token_is_measured_once_in_split_layouts(model: str, tmp_path: Path) -> None:
    layouts = [{"context": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}]
    cases = [{"path": model, "dtype": "float32", "parallel": layout} for layout in layouts]
    for steps in measure(cases, 2, tmp_path):
        check_is_noise(steps, 1e-8, 1e-5)
        assert steps[0]["noise/tokens"] == chosen_tokens(make_batch())
