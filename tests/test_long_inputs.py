"""No sequence that enters the model passes its positions, on any path; what is cut is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd import sft, train
from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics

POSITIONS, RESPONSE = 256, 12
WORD = "one two "


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Method of the actor -> the lengths of the sequences that it was given."""
    seen: dict[str, list[int]] = {}

    def watch(name: str) -> None:
        method = getattr(Actor, name)

        def watched(self: Actor, sequences: Any, *rest: Any, **named: Any) -> Any:
            seen.setdefault(name, []).extend(s.num_inputs for part in sequences for s in part)
            return method(self, sequences, *rest, **named)

        monkeypatch.setattr(Actor, name, watched)

    for name in ("update", "token_log_probs", "token_states"):
        watch(name)
    return seen


@pytest.fixture
def configured(
    make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path
) -> Callable[..., Config]:
    """A context of 256, one question of some 980 tokens among eight, solutions of 8 to 232."""
    model = tmp_path / "short"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    data = tmp_path / "data.jsonl"
    lines = [
        {
            "prompt": WORD * (120 if number == 3 else 2),
            "answer": "2",
            "reference_solution": WORD * (1 + 4 * number),
        }
        for number in range(8)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**sections: Any) -> Config:
        source = [{"kind": "jsonl", "path": str(data)}]
        return make_config(
            **{
                "model": {"hf_path": str(model)},
                "data": {"train": source, "eval": source},
                "rollout": {"prompts_per_step": 4, "max_response_tokens": RESPONSE},
                "train": {"steps": 2, "max_tokens_per_microbatch": 512},
                **sections,
            }
        )

    return make


def test_student_teacher_contrast_and_evaluation(
    configured: Callable[..., Config], lengths: dict[str, list[int]]
) -> None:
    config = configured(
        algorithm={"evidence": "correct_over_wrong_hint", "rlsd_lambda": 0.5},
        teacher={"hint": "own_correct_response"},
        prompts={"hint_introduction": WORD * 21, "sft_response": "{answer}"},
        reward={"solved_threshold": 0.4},
    )
    train.train(config)
    assert 200 < max(lengths["token_log_probs"]) <= POSITIONS - 1
    assert max(lengths["update"]) <= POSITIONS - 1
    steps = [m for m in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "train/loss" in m]
    assert sum(step["rollout/prompts_too_long"] for step in steps) >= 1
    warnings = (Path(config.run_dir) / "warnings.jsonl").read_text()
    assert "1 of the 4 problems of the evaluation source" in warnings


def test_a_reference_solution_is_cut_to_what_fits(
    configured: Callable[..., Config], lengths: dict[str, list[int]]
) -> None:
    config = configured(eval={"n_samples": 0, "greedy": False, "pass_at_k": [1]})
    train.train(config)
    # Every response has as many tokens as it may, so that the longest teacher's sequence is full.
    assert POSITIONS - 8 < max(lengths["token_log_probs"]) <= POSITIONS - 1
    steps = [m for m in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "train/loss" in m]
    assert 0 < sum(step["teacher/hint_cut_share"] for step in steps) < len(steps)


def test_supervised_targets(
    configured: Callable[..., Config], lengths: dict[str, list[int]]
) -> None:
    config = configured(
        sft={"steps": 2, "batch_size": 8, "privileged_share": 1.0},
        eval={"n_samples": 0, "greedy": False, "pass_at_k": [1]},
    )
    sft.train(config)
    assert max(lengths["update"]) <= POSITIONS - 1
    steps = [m for m in read_metrics(Path(config.run_dir) / "metrics.jsonl") if "train/loss" in m]
    # The long question, and the longest solution.
    assert all(step["data/examples_too_long"] >= 2 for step in steps)
    assert all(step["data/hints_cut"] > 0 for step in steps)
