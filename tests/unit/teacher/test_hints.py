"""Hints that come from a response's own group."""

from __future__ import annotations

import pytest

from megatron_rlsd.algorithms import Source
from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.teacher import response_hints, wrong_hints
from megatron_rlsd.types import Generation, Group, Problem
from tests.batches import trajectory


def group(*texts: str, **metadata: object) -> Group:
    problem = Problem("p/1", ({"role": "user", "content": "?"},), "3", metadata=metadata)
    generation = Generation.of([1], [0.0], "stop", 0)
    return Group(problem, [trajectory(problem, generation, text) for text in texts])


def hints(group: Group, solved: list[bool | None], hint: str, **teacher: object):
    return response_hints(group, solved, TeacherConfig.model_validate({"hint": hint, **teacher}))


@pytest.mark.parametrize("hint", ["none", "answer", "reference_solution"])
def test_the_problems_own_hints_are_left_to_the_prompts(hint):
    assert hints(group("a", "b"), [True, False], hint) == [Source.PROBLEM] * 2


def test_the_hint_may_depend_on_whether_the_response_is_right() -> None:
    chosen = hints(group("a", "b", "c"), [True, False, True], "own_correct_or_reference")
    assert chosen == ["c", Source.PROBLEM, "a"]
    # Without a verdict a response is not known to be right.
    chosen = hints(group("a", "b", "c"), [True, None, False], "own_correct_or_reference")
    assert chosen == [None, Source.PROBLEM, Source.PROBLEM]


def test_another_correct_response_never_its_own():
    chosen = hints(group("a", "b", "c", "d"), [True, False, True, False], "own_correct_response")
    assert chosen == ["c", "c", "a", "a"]


def test_a_lone_correct_response_teaches_the_others_only():
    chosen = hints(group("a", "b", "c"), [False, True, False], "own_correct_response")
    assert chosen == ["b", None, "b"]
    assert hints(group("a", "b"), [False, False], "own_correct_response") == [None, None]
    assert hints(group("a"), [True], "own_correct_response") == [None]


def test_wrong_hints_are_wrong_and_of_others():
    solved = [True, False, True, False]
    assert wrong_hints(group("a", "b", "c", "d"), solved) == [("b",), ("d",), ("d",), ("b",)]
    assert wrong_hints(group("a", "b"), [True, False]) == [("b",), ()]
    assert wrong_hints(group("a", "b"), [True, True]) == [(), ()]


def test_several_wrong_hints_hold_an_answer_and_never_the_response_itself() -> None:
    six = group("a", "b", "c", "d", "b", "e")
    solved = [True, False, False, None, False, False]
    assert wrong_hints(six, solved, most=2) == [
        ("b", "c"),
        ("c", "e"),  # not "b" again, which is its own text
        ("b", "e"),
        ("b", "e"),
        ("e", "c"),
        ("b", "c"),
    ]
    answered = [True, True, False, True, True, False]
    assert wrong_hints(six, solved, most=4, usable=answered) == [
        ("b", "b"),
        (),
        ("b", "b"),
        ("b", "b"),
        (),
        ("b", "b"),
    ]


def test_the_next_correct_step_is_where_the_response_leaves_a_right_one() -> None:
    texts = ("1 + 2 = 3 \n3 + 4 = 8\n#### 8", "4 + 3 = 7\n#### 7", "1 + 2 = 3\n3 + 4 = 7\n#### 7")
    chosen = hints(group(*texts), [False, True, True], "own_correct_step")
    # The second right one agrees for a line; the responses that are right have each other.
    assert chosen == ["1 + 2 = 3\n3 + 4 = 7", "1 + 2 = 3", "4 + 3 = 7"]
    assert hints(group("a", "b"), [True, False], "own_correct_step") == [None, "a"]
    assert hints(group("a", "a"), [True, True], "own_correct_step") == [None, None]
    assert hints(group("1\n2\n3", "1\n2"), [False, True], "own_correct_step") == ["1\n2", None]


def test_a_response_without_a_verdict_is_neither_a_right_nor_a_wrong_hint():
    solved = [None, True, False, None]
    four = group("a", "b", "c", "d")
    assert hints(four, solved, "own_correct_response") == ["b", None, "b", "b"]
    assert wrong_hints(four, solved) == [("c",), ("c",), (), ("c",)]


def test_a_response_without_text_is_no_hint():
    assert hints(group("a", " \n", "c"), [True] * 3, "own_correct_response") == ["c", "c", "a"]


def test_a_critique_is_the_problems_metadata():
    with_critique = group("a", "b", critique=" Mind the sign. ", other="Else.")
    assert hints(with_critique, [True, False], "critique") == ["Mind the sign."] * 2
    assert hints(with_critique, [True, False], "critique", critique_key="other") == ["Else."] * 2
    assert hints(group("a", "b", critique=7), [True, False], "critique") == [None, None]
    assert hints(group("a", "b"), [True, False], "critique") == [None, None]
