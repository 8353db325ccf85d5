"""Groups that are scored one by one have the scores of the whole step."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from megatron_rlsd.config import parse_config
from megatron_rlsd.learner import Learner, Plan, Scores
from megatron_rlsd.types import TrainBatch
from tests.actors import actor_of
from tests.batches import rows_of, train_row
from tests.distributed.layouts import VOCAB, save_models
from tests.distributed.ranks import run_on_ranks

GROUPS, SAMPLES = 3, 4


def make_batch() -> TrainBatch:
    """Some rows of no advantage, some without a hint, some with an environment's tokens."""
    rng = random.Random(5)

    def ids(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randrange(shortest, longest))]

    rows = []
    for i in range(GROUPS * SAMPLES):
        prompt, response = ids(2, 20), ids(2, 40)
        rows.append(
            train_row(
                *(prompt, response, 0.0 if i % 5 == 0 else (-1.0) ** i),
                teacher_prompt_ids=None if i % 7 == 3 else [1] * 11 + prompt,
                loss_mask=[1, *(int(rng.random() < 0.7) for _ in response[1:])],
            )
        )
    return TrainBatch.of(rows)


def compare(model: str, algorithm: dict, top_p: float, out: str) -> None:
    """On every rank: the same scores, and the same update, whole and by groups."""
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": model, "dtype": "float32"},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "algorithm": algorithm,
            "train": {"max_tokens_per_microbatch": 64, "global_batch_size": 6},
            "rollout": {
                "prompts_per_step": GROUPS,
                "n_samples_per_prompt": SAMPLES,
                "top_p": top_p,
            },
        }
    )
    with actor_of(config, 4, seconds=60) as actor:
        learner, batch = Learner(config, actor), make_batch()
        plan = learner.plan(batch, 0, 0.5)
        whole = learner.score(plan)
        rows = rows_of(batch)
        parts: list[tuple[Plan, Scores]] = []
        numbers = [list(range(at, at + SAMPLES)) for at in range(0, len(rows), SAMPLES)]
        numbers = numbers[::-1]  # the last one comes first
        for group in numbers:
            part = learner.plan(TrainBatch.of([rows[number] for number in group]), 0, 0.5)
            parts.append((part, learner.score(part)))
        joined = learner.joined(plan, parts, numbers)
        assert joined.metrics == whole.metrics
        mine = {row for each in plan.mini_batches for row in each.by_rank[plan.dp_rank]}
        teacher = "teacher_states" if "divergence_coef" in algorithm else "teacher"
        assert plan.wanted.keys() >= {"old", teacher}
        assert ("kept" in plan.wanted) == (top_p < 1)
        for kind, wanted in plan.wanted.items():
            one, other = whole.rows(kind), joined.rows(kind)
            assert one is not None
            assert other is not None
            assert one.keys() == other.keys() == wanted & mine
            for row, values in one.items():
                torch.testing.assert_close(other[row], values, atol=1e-6, rtol=0)
        Path(out, f"{actor.groups.rank}.txt").write_text(repr(learner.update(plan, joined)))


def test_scores_of_groups_are_those_of_the_step(tmp_path: Path) -> None:
    model = str(save_models(tmp_path / "models")["untied"])
    for algorithm, top_p in (
        ({"kl_coef": 0.1, "tis": "sequence"}, 0.6),
        ({"name": "grpo_opsd", "rlsd_lambda": 0.0, "divergence_coef": 0.1}, 1.0),
    ):
        run_on_ranks(compare, 2, model, algorithm, top_p, str(tmp_path), seconds=120)
        first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
        assert first == second
