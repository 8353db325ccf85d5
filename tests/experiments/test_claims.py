"""The parts of the claims experiment that could be wrong without anybody noticing."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from examples.experiments import claims, claims_report, modular_chain
from examples.experiments.flipped_reward import flipped
from examples.experiments.shuffled_evidence import ShuffledLearner
from examples.experiments.token_credit import gradient_mass, judged_characters
from megatron_rlsd.learner import Learner, Plan, Scores
from megatron_rlsd.rewards.exact_match import exact_match
from megatron_rlsd.types import Problem, RewardInput
from tests.batches import train_row

QUESTION = "State the final answer to the following arithmetic problem: 2 + 8 - 9 ="


def verdicts(response: str, question: str = QUESTION, modulus: int | None = None) -> str:
    letters = {True: "r", False: "w", None: "."}
    return "".join(letters[v] for v in judged_characters(question, response, modulus))


def test_a_right_response_is_right_throughout() -> None:
    assert set(verdicts("2 + 8 = 10\n10 - 9 = 1\n#### 1")) == {"r"}


def test_a_slip_is_wrong_at_its_digit_and_later_lines_are_judged_by_what_was_reached() -> None:
    text = "2 + 8 = 11\n11 - 9 = 2\n#### 2"
    expected = "rrrrrrrrrw." + "r" * (len(text) - 11)
    assert verdicts(text) == expected


def test_a_final_answer_that_does_not_follow_is_wrong() -> None:
    assert verdicts("2 + 8 = 10\n10 - 9 = 1\n#### 7").endswith("rw")


def test_every_solution_of_a_modular_chain_is_right() -> None:
    rng = random.Random(3)
    for _ in range(50):
        problem = modular_chain.problem(rng, 7)
        response = f"{problem['reference_solution']}\n#### {problem['answer']}"
        assert set(verdicts(response, problem["prompt"], modular_chain.MODULUS)) == {"r"}


def test_gradient_mass_counts_praise_of_slips_and_blame_of_right_tokens() -> None:
    response = "2 + 8 = 11"
    columns = {
        "text": ["2 + 8 = ", "1", "1"],
        "advantages": [-1.0, -1.0, -3.0],
        "log_probs": [torch.tensor(p).log().item() for p in (0.9, 0.5, 0.5)],
    }
    sample = {"question": QUESTION, "response": response, "token_columns": columns}
    misdirected, judged = gradient_mass(sample, None)
    assert misdirected == pytest.approx(0.1 + 0.5)
    assert judged == pytest.approx(0.1 + 0.5 + 1.5)


def test_students_interval_and_p_value_agree_with_the_tables() -> None:
    mean, half = claims_report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=1e-3)
    assert float(claims_report.p_value(2.776, 4)) == pytest.approx(0.05, abs=1e-4)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert claims_report.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )


def test_a_share_of_verdicts_is_inverted_the_same_way_each_time() -> None:
    def sample(number: int, response: str) -> RewardInput:
        problem = Problem(str(number), ({"role": "user", "content": "?"},), "7")
        return RewardInput(problem, response, 3, 9, "stop")

    samples = [sample(i, f"#### {i % 2 * 7}") for i in range(2000)]
    pattern = "#### ([0-9]+)"
    values = [flipped(s, pattern, 0.3) for s in samples]
    assert values == [flipped(s, pattern, 0.3) for s in samples]
    wrong = sum(v != exact_match(s, pattern) for v, s in zip(values, samples, strict=True))
    assert 0.26 < wrong / 2000 < 0.34


def test_the_control_keeps_each_responses_gains_and_moves_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = [[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], [-1.0, -2.0]]
    teacher = {0: torch.tensor([-0.2, -0.1, -3.0, -0.4, -0.7, -0.5])}
    monkeypatch.setattr(Learner, "score", lambda *_: Scores(teacher={0: teacher[0].clone()}))
    learner = ShuffledLearner.__new__(ShuffledLearner)
    learner._generator = torch.Generator().manual_seed(0)
    rows = {
        0: train_row([1], [3] * 6, rollout_log_probs=student[0]),
        1: train_row([1], [4] * 2, rollout_log_probs=student[1]),
    }
    shuffled = learner.score(cast(Plan, SimpleNamespace(row=rows.get))).teacher
    assert shuffled is not None
    before, after = (t - torch.tensor(student[0]) for t in (teacher[0], shuffled[0]))
    torch.testing.assert_close(before.sort().values, after.sort().values)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("task", claims.TASKS)
@pytest.mark.parametrize("arm", claims.ARMS)
def test_every_arm_is_a_valid_configuration(task: str, arm: str) -> None:
    config = claims.settings(task, 3, arm, [])
    assert Path(config.model.hf_path).parts[-3] == "warm_1"
    assert config.reward.functions[0].name == "exact_match"
    assert sum(f.weight for f in config.reward.functions) == 1
