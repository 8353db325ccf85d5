"""Worked solutions lead, step by true step, to the item's own answer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from reasoning_gym import create_dataset

from megatron_rlsd.data.worked_solutions import (
    evaluate_stepwise,
    word_problem_solution,
    worked_solution,
)

STEP = re.compile(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)( \(rounded down\))?")
NEGATION = re.compile(r"-\((-?\d+)\) = (-?\d+)")


def check_step(step: str) -> None:
    if negation := NEGATION.fullmatch(step):
        assert int(negation[2]) == -int(negation[1]), step
        return
    match = STEP.fullmatch(step)
    assert match, step
    left, right, value = int(match[1]), int(match[3]), int(match[4])
    exact = {"+": left + right, "-": left - right, "*": left * right}.get(match[2])
    if exact is None:
        assert left // right == value, step
        assert bool(match[5]) == bool(left % right), step
    else:
        assert exact == value, step


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("chain_sum", {}),
        ("chain_sum", {"min_terms": 1, "max_terms": 12, "max_digits": 9}),
        ("chain_sum", {"allow_negation": True, "max_terms": 8}),
        ("basic_arithmetic", {}),
        ("basic_arithmetic", {"min_terms": 8, "max_terms": 14, "max_digits": 2}),
        ("basic_arithmetic", {"whitespace": "no_space", "min_terms": 1}),
        ("basic_arithmetic", {"whitespace": "random", "format_style": "natural"}),
        ("products", {"max_terms": 5, "allow_negation": True}),
    ],
)
def test_every_step_is_true_and_the_last_gives_the_answer(task: str, params: dict) -> None:
    items = create_dataset(task, seed=11, size=500, **params)
    for index in range(500):
        item = items[index]
        solution = worked_solution(task, item)
        assert solution is not None, item
        steps = solution.split("\n")
        if "=" not in solution:
            assert solution == item["answer"]
            continue
        for step in steps:
            check_step(step)
        result = steps[-1].rpartition("= ")[2].removesuffix(" (rounded down)")
        assert result == item["answer"], item


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("12 - 7 + 30", ["12 - 7 = 5", "5 + 30 = 35"]),
        ("2 + 3 * 4", ["3 * 4 = 12", "2 + 12 = 14"]),
        ("(2 + 3)*-4", ["2 + 3 = 5", "5 * -4 = -20"]),
        ("-( 1 - 4 ) - -2", ["1 - 4 = -3", "-(-3) = 3", "3 - -2 = 5"]),
        ("-7 / 2", ["-7 / 2 = -4 (rounded down)"]),
        ("8 / 2 / 2", ["8 / 2 = 4", "4 / 2 = 2"]),
        ("-5", []),
    ],
)
def test_steps_follow_the_order_of_evaluation(expression: str, steps: list[str]) -> None:
    assert evaluate_stepwise(expression)[1] == steps


@pytest.mark.parametrize("expression", ["", "1 +", "(1", "1 2", "1 ^ 2", "1)"])
def test_other_text_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"expect|ends|invalid"):
        evaluate_stepwise(expression)


def arithmetic_entry(expression: str, answer: str) -> dict[str, Any]:
    return {"question": "", "answer": answer, "metadata": {"expression": expression}}


def test_no_solution_leads_to_another_answer() -> None:
    assert worked_solution("chain_sum", arithmetic_entry("1 + 1", "2")) == "1 + 1 = 2"
    assert worked_solution("chain_sum", arithmetic_entry("1 + 1", "3")) is None
    assert worked_solution("basic_arithmetic", arithmetic_entry("1 / 0", "3")) is None
    assert worked_solution("sudoku", {"question": "", "answer": "", "metadata": {}}) is None


def test_word_problems_come_with_their_reasoning() -> None:
    items = create_dataset("gsm_symbolic", seed=2, size=200)
    for index in range(200):
        solution = worked_solution("gsm_symbolic", items[index])
        assert solution
        assert "####" not in solution
        assert items[index]["metadata"]["answer_cot"].startswith(solution)


@pytest.mark.parametrize(
    ("reasoning", "answer", "solution"),
    [
        ("a\nb = 15.0\n#### 15.0", "15", "a\nb = 15.0"),
        ("so\n\n#### 1,500\n", "1500", "so"),
        ("so\n#### 14", "15", None),
        ("so\n#### many", "15", None),
        ("#### 15", "15", None),
        ("no last line", "15", None),
    ],
)
def test_the_last_line_must_state_the_answer(
    reasoning: str, answer: str, solution: str | None
) -> None:
    entry = {"question": "", "answer": answer, "metadata": {"answer_cot": reasoning}}
    assert word_problem_solution(entry) == solution
