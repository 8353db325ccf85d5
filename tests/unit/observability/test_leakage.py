from __future__ import annotations

import pytest

from megatron_rlsd.observability.leakage import leakage, leakage_metrics
from megatron_rlsd.types import Generation, Problem, Trajectory
from tests.batches import trajectory as a_trajectory

QUESTION = "Tom has 3 boxes of 14 pens. How many pens are there?"


@pytest.mark.parametrize(
    "text",
    [
        "According to the reference solution, we multiply.",
        "This follows the provided\nanswer.",
        "As given in the solution, 3 * 14 = 42.",
        "As the solution above shows, it is 42.",
        "The Reference Answer says 42.",
        "We already know the answer is 42, so we only check it.",
        "which matches the expected answer",
        "the solution we were given multiplies",
        "the ground-truth solution",
    ],
)
def test_a_reference_to_a_solution_is_found_where_it_stands(text: str) -> None:
    before = "First, multiply. "
    found = leakage(before + text, QUESTION, "42")
    assert found.phrases
    for start, end in found.phrases:
        assert len(before) <= start < end <= len(before + text)


@pytest.mark.parametrize(
    "text",
    [
        "3 * 14 = 42, so the answer is 42.",
        "The solution is to multiply. The final answer: 42",
        "Given the number of boxes, the result is 42.",
        "Referring to the question, a solution exists. I will provide an answer.",
        "",
    ],
)
def test_ordinary_reasoning_is_not_leakage(text: str) -> None:
    assert leakage(text, QUESTION, "42").phrases == ()


def test_a_phrase_of_the_question_itself_says_nothing() -> None:
    question = "Is the provided answer 41 right? " + QUESTION
    assert leakage("The provided answer is wrong.", question, "42").phrases == ()
    assert leakage("The provided solution is wrong.", question, "42").phrases == ((0, 21),)


def test_the_answer_counts_as_early_only_as_a_whole_number_near_the_start() -> None:
    reasoning = " because 3 boxes of 14 pens each are 3 * 14 pens, as I shall now show."
    assert leakage("42," + reasoning, QUESTION, "42").answer_first == (0, 2)
    assert leakage("It is **42**" + reasoning, QUESTION, "42").answer_first == (8, 10)
    for other in ("142", "421", "4.42", "42.5", "-42", "1,42"):
        assert leakage(other + reasoning, QUESTION, "42").answer_first is None, other
    assert leakage(reasoning + " 42", QUESTION, "42").answer_first is None
    assert leakage("#### 42", QUESTION, "42").answer_first is None  # no reasoning, none skipped
    assert leakage("-7 = 4 - 11" + reasoning, QUESTION, "-7").answer_first == (0, 2)


def test_an_answer_that_the_question_holds_cannot_leak() -> None:
    assert not leakage("3 it is, and here is a long reasoning", QUESTION, "3").answer_can_leak
    assert not leakage("anything", QUESTION, " ").answer_can_leak


def test_shares_count_responses_and_leave_out_what_nobody_could_leak() -> None:
    def trajectory(response: str, answer: str) -> Trajectory:
        problem = Problem("p", ({"role": "user", "content": QUESTION},), answer)
        return a_trajectory(problem, Generation.of([2], [0.0], "stop", 0), response)

    early, phrase = "42 is what 3 times 14 makes, I think", "By the reference solution, 42"
    responses = [trajectory(early, "42"), trajectory(phrase, "42"), trajectory(early, "3")]
    assert leakage_metrics(responses) == {
        "leakage/phrase_share": 1 / 3,
        "leakage/answer_first_share": 1 / 2,
    }
    assert set(leakage_metrics(responses[2:])) == {"leakage/phrase_share"}
    assert leakage_metrics([]) == {}
