"""Verdicts on final answers: the committed pairs, and what other graders let through."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_rlsd.rewards.math_answers import equal_answers
from tests.unit.rewards.answer_pairs import ANSWERS, Answer


def one_character_apart(left: str, right: str) -> bool:
    """Is one text the other with one character put in, left out, or changed?"""
    shorter, longer = sorted((left, right), key=len)
    if len(longer) - len(shorter) > 1 or left == right:
        return False
    same = next((i for i, c in enumerate(shorter) if c != longer[i]), len(shorter))
    return longer[same + 1 :] in (shorter[same:], shorter[same + 1 :])


def test_there_are_pairs_enough_of_every_form_and_half_are_wrong_by_one_character() -> None:
    forms: Counter[str] = Counter()
    right = wrong = 0
    for answer in ANSWERS:
        forms[answer.form] += len(answer.right + answer.wrong)
        right += len(answer.right)
        wrong += len(answer.wrong)
        for given in answer.wrong:
            correct = (answer.reference, *answer.right)
            assert any(one_character_apart(given, each) for each in correct), (answer, given)
    assert set(forms) == {"MATH", "GSM8K", "AIME", "GPQA", "MMLU"}
    assert right + wrong >= 150
    assert min(forms.values()) >= 12
    assert abs(right - wrong) <= 0.05 * (right + wrong)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a.form} {a.reference}")
def test_every_pair_gets_its_verdict_in_both_directions(answer: Answer) -> None:
    assert equal_answers(answer.reference, answer.reference)
    for given in answer.right:
        assert equal_answers(answer.reference, given), given
        assert equal_answers(given, answer.reference), given
    for given in answer.wrong:
        assert not equal_answers(answer.reference, given), given
        assert not equal_answers(given, answer.reference), given


@pytest.mark.parametrize(
    ("left", "right"),
    [
        # Words are not products of letters.
        ("east", "seat"),
        (r"\text{east}", "seat"),
        ("listen", "silent"),
        ("no", "on"),
        ("2 east", "2 seat"),
        # Not equal, however small the difference.
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        ("0.00000001", "0.00000002"),
        ("1234567.1", "1234567.2"),
        (r"(\frac{1}{2^{99}}, 1)", r"(\frac{1}{2^{98}}, 1)"),
        (r"\frac{10^{50}+1}{10^{50}}", "1"),
        ("0.1000000000000000000001", "0.1"),
        # Chains of values are not an answer, and an equation is not its right-hand side.
        ("5", "6=5"),
        ("5", "2+3=5"),
        ("5", "x = 6 = 5"),
        ("0", "2x+3y-z=0"),
        ("1", "x^2+y^2=1"),
        ("x=5", "y=5"),
        # Units, currencies and bases that differ.
        (r"\$5", "5 cents"),
        (r"\$5", "5%"),
        ("5 cm", "5 cm^2"),
        ("2 hours 30 minutes", "30 hours 2 minutes"),
        ("1011_2", "1011_3"),
        # What math-verify reads otherwise.
        ("1 234", "235"),
        ("12:30", "2:5"),
        ("f'(x)", "f(x)"),
        ("5m", "5"),
        ("1,2", "(2,1)"),
        ("12:30 PM", "12:30 AM"),
        ("5 apples", "5 pears"),
    ],
)
def test_what_differs_is_not_equal(left: str, right: str) -> None:
    assert not equal_answers(left, right)
    assert not equal_answers(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("$$5$$", r"\(5\)"),
        ("½", "0.5"),
        ("x²", "x^2"),
        ("–5", "-5"),
        ("3e8", r"3 \times 10^8"),
        ("1 1/2", "1.5"),
        ("1 000 000", "1,000,000"),
        ("sin x", r"\sin x"),
        (r"\pm 2", "2, -2"),
        (r"60 \text{ miles per hour}", "60 mph"),
        (r"25^\circ\text{C}", "25 °C"),
        ("(1,2)", "1 < x < 2"),
        ("9^{9^{9^9}}", "9^{9^{9^{9}}}"),
        ("A \\cup B", "A \\cup  B"),
        ("6=5", "6 = 5"),
    ],
)
def test_what_is_written_in_another_way_is_equal(left: str, right: str) -> None:
    assert equal_answers(left, right)
    assert equal_answers(right, left)
