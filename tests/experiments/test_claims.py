"""The parts of the claims experiment that could be wrong without anybody noticing."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from examples.experiments import (
    claims,
    claims_design,
    claims_report,
    claims_statistics,
    modular_chain,
)
from examples.experiments.claims_report import RunResult
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
    mean, half = claims_statistics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=1e-3)
    assert float(claims_statistics.p_value(2.776, 4)) == pytest.approx(0.05, abs=1e-4)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert claims_statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
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
    config = claims.settings(task, 3, arm + "+wrong0.3", [])
    assert Path(config.model.hf_path).parts[-3] == "warm_1"
    right, flipped_verdict = config.reward.functions
    assert (right.name, right.weight) == ("exact_match", 0)
    assert flipped_verdict.params["share"] == 0.3


def test_what_an_arms_name_changes_and_nothing_else() -> None:
    plain = claims.settings("chain_sum", 0, "grpo", []).model_dump()
    changed = claims.settings("chain_sum", 0, "grpo+lr2e-4+samples2", []).model_dump()
    assert changed["optimizer"].pop("lr") == 2 * plain["optimizer"].pop("lr")
    sizes = [
        config["rollout"].pop(key)
        for config in (plain, changed)
        for key in ("prompts_per_step", "n_samples_per_prompt")
    ]
    assert sizes == [8, 8, 32, 2]
    assert changed.pop("run_dir") == plain.pop("run_dir") + "+lr2e-4+samples2"
    assert changed == plain
    for wrong in ("grpoo", "grpo+speed2", "grpo+lr", "grpo+lr2e-4+lr1e-4"):
        with pytest.raises(ValueError, match="there is no arm 'grpo"):
            claims.parts_of(wrong)


def test_the_design_screens_on_other_seeds_and_confirms_what_was_best() -> None:
    screening = claims_design.screening()
    assert len(set(screening)) == len(screening) == 96
    assert claims_design.order({}) == screening
    found = dict.fromkeys(screening, 0.5)
    found |= {("chain_sum", "antisd+lr2e-4", seed): 0.7 for seed in (20, 21)}
    found |= {("chain_sum", "cscr+lr5e-5", 20): 0.8, ("chain_sum", "rlsd+lr5e-5", 20): 0.6}
    assert claims_design.chosen(found) == ["grpo", "rlsd+lr5e-5", "antisd+lr2e-4", "cscr+lr5e-5"]
    left = claims_design.order(found)
    assert left[:4] == [("chain_sum", arm, 0) for arm in claims_design.chosen(found)]
    assert len(left) == 4 * (2 * 2 * 10 + 3 * 5)
    assert not {seed for _, _, seed in left} & set(claims_design.SCREENING_SEEDS)
    del found[screening[-1]]
    assert claims_design.order(found) == screening[-1:]


def run_result(at_40: float, warm_start: str = "a", slope: float = 0.01) -> RunResult:
    curve = {step: at_40 + slope * (step - 40) for step in (20, 40, 60)}
    return RunResult(
        *(curve, curve, curve),
        curves={"solved": [0.5] * 40, "tokens": [30.0] * 40, "sampled_tokens": [1920.0] * 40},
        entropy=0.1,
        divergence=None,
        misdirected=0.25,
        leakage=0.0,
        cpu_seconds=60.0,
        warm_start=warm_start,
    )


def test_pairs_share_their_warm_start_and_grpo_has_the_time_of_the_other_arm() -> None:
    results = {
        ("chain_sum", arm + "+wrong0.3", seed): run_result(accuracy + 0.1 * (seed % 2), warm)
        for arm, accuracy, of_seed_2 in (("grpo+lr2e-4", 0.5, "a"), ("rlsd", 0.75, "b"))
        for seed, warm in ((0, "a"), (1, "a"), (2, of_seed_2), (3, "a"))
    }
    results["chain_sum", "rlsd+wrong0.3", 3] = run_result(0.95)
    times = {"chain_sum": {"grpo": 0.5, "rlsd": 0.75}}
    table = claims_report.comparisons(results, times)
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| chain_sum")]
    (cells,) = rows
    assert cells[1:3] == ["rlsd+wrong0.3", "3"]
    # .25, .25 and .35 at equal samples; GRPO's 20 further steps are worth .2.
    assert [cell.split(" +- ")[0] for cell in cells[3:7]] == ["+0.283", "+0.083", *["+0.283"] * 2]
    assert table.endswith("2 comparisons corrected for.\n")
    assert "| - |" in claims_report.comparisons(results, {})


def test_results_accumulate_in_one_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(claims_report, "FOUND", tmp_path / "found.json")
    one = {("chain_sum", "rlsd", 3): run_result(0.5), ("chain_sum", "grpo", 3): run_result(0.4)}
    claims_report.save(one)
    found = claims_report.gathered(tmp_path, ["chain_sum"])
    assert found == one
    assert claims_report.accuracies(found) == {
        ("chain_sum", "rlsd", 3): 0.5,
        ("chain_sum", "grpo", 3): 0.4,
    }


def test_the_detectable_difference_is_the_noncentral_one_to_a_percent() -> None:
    # Ten pairs of spread 1: the exact value of a one-sample t test is 0.996.
    pairs = [(-1) ** i * 0.9**0.5 for i in range(10)]
    assert claims_statistics.detectable(pairs) == pytest.approx(0.996, rel=0.01)
