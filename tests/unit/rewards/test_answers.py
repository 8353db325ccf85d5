from __future__ import annotations

import time

import pytest

from megatron_rlsd.rewards.answers import (
    check_answer_pattern,
    extract_answer,
    last_boxed,
    same_number,
    same_text,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{5} and an open { brace", "5"),
        (r"a stray } and \boxed{6}", "6"),
        (r"\boxed{1} but then \boxed{2", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{never closed", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_box_with_balanced_braces(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_finding_the_box_takes_linear_time() -> None:
    start = time.perf_counter()
    assert last_boxed(r"\boxed{" * 100_000) is None
    assert time.perf_counter() - start < 2


def test_pattern_takes_group_1_of_its_last_match() -> None:
    response = "<answer>1</answer> no, <answer> 2 </answer>"
    assert extract_answer(response, "<answer>(.*?)</answer>") == "2"
    assert extract_answer(r"\boxed{3}", "<answer>(.*?)</answer>") is None
    assert extract_answer("a", "a(b)?") is None


def test_patterns_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="no group"):
        check_answer_pattern("answer")
    with pytest.raises(ValueError, match="not a regular expression"):
        check_answer_pattern("(answer")


def test_text_is_compared_up_to_white_space() -> None:
    assert same_text(" a  b\n", "a b")
    assert not same_text("ab", "a b")
    assert not same_text("A", "a")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("1,000", "1000", True),
        ("1000", "1000.0", True),
        ("+3", "3.", True),
        ("-0.50", "-.5", True),
        ("007", "7", True),
        ("123456789012345678901234567890", "123456789012345678901234567891", False),
        ("1,00", "100", False),
        ("3", "3 apples", False),
        ("nan", "nan", False),
        ("1e3", "1000", True),
        ("1e-5", "0.00001", True),
        ("1E+400", "1" + "0" * 400, True),
        ("1e400", "1e401", False),
        ("e3", "1000", False),
        ("1e9999999", "1e9999999", False),
        ("-0.0", "0", True),
        ("", "", False),
        ("٣", "٣", True),
    ],
)
def test_plain_numbers_are_compared_by_value(left: str, right: str, same: bool) -> None:
    assert same_number(left, right) is same
