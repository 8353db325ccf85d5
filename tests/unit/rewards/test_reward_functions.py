from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlsd.config import JsonlSource
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.rewards.errors import TimeLimitExceeded
from megatron_rlsd.rewards.exact_match import exact_match
from megatron_rlsd.rewards.math_answers import math_verify
from megatron_rlsd.rewards.reasoning_gym_scorer import reasoning_gym
from megatron_rlsd.rewards.response_shape import format_reward, length_penalty
from megatron_rlsd.types import RewardInput

Sample = Callable[..., RewardInput]


def test_exact_match(sample: Sample) -> None:
    assert exact_match(sample(r"\boxed{ 7 }")) == 1.0
    assert exact_match(sample(r"\boxed{8}")) == 0.0
    assert exact_match(sample("7")) == 0.0
    assert exact_match(sample("Answer: 7"), pattern=r"Answer: (\S+)") == 1.0
    assert exact_match(sample(r"\boxed{1,000}", "1000")) == 0.0
    assert exact_match(sample(r"\boxed{1,000}", "1000.0"), numeric=True) == 1.0
    assert exact_match(sample(r"\boxed{x}", "x"), numeric=True) == 1.0


@pytest.mark.parametrize(
    ("answer", "response", "value"),
    [
        ("72", r"So we get \boxed{72}.", 1.0),
        ("72", "So the answer is 72.", 1.0),
        ("72", r"\boxed{73}", 0.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("$x^2+1$", r"\boxed{1+x^2}", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        ("1,000", r"\boxed{1000}", 1.0),
        ("1,2", r"$x=\boxed{1}$ or $x=\boxed{2}$", 1.0),
        ("2", r"First \boxed{1}, and then \boxed{2}", 1.0),
        (r"\$18.90", "She pays $18.90", 1.0),
        ("east", r"It flies $\text{east}$", 1.0),
        ("east", r"\boxed{seat}", 0.0),
        ("5", r"\boxed{6=5}", 0.0),
        (r"\boxed{7}", r"\boxed{7}", 1.0),
        ("7", r"\boxed{\frac{1}{}", 0.0),
        ("7", "", 0.0),
    ],
)
def test_math_verify_judges_values_not_spelling(
    sample: Sample, answer: str, response: str, value: float
) -> None:
    assert math_verify(sample(response, answer)) == value


def test_math_verify_with_a_pattern_reads_only_the_match(sample: Sample) -> None:
    pattern = "<answer>(.*?)</answer>"
    assert math_verify(sample(r"\boxed{7}"), pattern=pattern) == 0.0
    assert math_verify(sample(r"<answer>\frac{14}{2}</answer> 9"), pattern=pattern) == 1.0


def test_math_verify_tells_an_expensive_answer_from_a_wrong_one(sample: Sample) -> None:
    with pytest.raises(TimeLimitExceeded, match="longer than 1 s"):
        math_verify(sample(rf"\boxed{{{'1+' * 20_000}1}}"), timeout_seconds=1)


@pytest.mark.parametrize("boxed", [True, False])
def test_math_verify_has_no_verdict_where_the_alarm_was_lost(
    sample: Sample, boxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import math_verify as library

    def deaf(*arguments: object, **options: object) -> list[object]:
        time.sleep(1.1)
        return ["7"]

    monkeypatch.setattr(library, "parse", deaf)
    text = r"\boxed{7 \cdot 3 - 14}" if boxed else "It is 7."
    with pytest.raises(TimeLimitExceeded):
        math_verify(sample(text), timeout_seconds=1)


def test_math_verify_never_works_out_a_number_without_bound(sample: Sample) -> None:
    for tower in (r"9^{9^{9^{9}}}", r"(10^9)!", "1.0000001^{10000000}", r"(2^{30})^{2^{30}}"):
        assert math_verify(sample(rf"\boxed{{{tower}}}"), timeout_seconds=1) == 0.0
        assert math_verify(sample(rf"\boxed{{{tower}}}", answer=tower), timeout_seconds=1) == 1.0


def test_both_verifiers_read_the_numbers_of_a_data_file(sample: Sample, tmp_path: Path) -> None:
    literals = {
        "0.00001": ("0.00001", "1e-5"),
        "1e400": ("1e400", "1" + "0" * 400),
        "-0.0": ("0", "-0.0"),
        "12345678901234567890123": ("12345678901234567890123", "12,345,678,901,234,567,890,123"),
        "2.50": ("2.5", "2.50"),
    }
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "?", "answer": {literal}}}\n' for literal in literals))
    table = JsonlProblems(JsonlSource(kind="jsonl", path=str(path)))
    for index, given in enumerate(literals.values()):
        answer = table[index].answer
        for each in given:
            assert math_verify(sample(rf"\boxed{{{each}}}", answer)) == 1.0
            assert exact_match(sample(rf"\boxed{{{each}}}", answer), numeric=True) == 1.0
        for wrong in ("e-5", "3", f"{given[0]}7"):
            assert math_verify(sample(rf"\boxed{{{wrong}}}", answer)) == 0.0
            assert exact_match(sample(rf"\boxed{{{wrong}}}", answer), numeric=True) == 0.0


def test_math_verify_reports_an_unreadable_reference(sample: Sample) -> None:
    with pytest.raises(ValueError, match="cannot read the answer ''"):
        math_verify(sample(r"\boxed{7}", answer=""))


def test_format_wants_the_whole_response_and_its_own_end(sample: Sample) -> None:
    pattern = r"(?s)<think>.*</think>\s*\\boxed\{.*\}"
    good = "<think>a\nb</think>\n\\boxed{7}"
    assert format_reward(sample(good), pattern) == 1.0
    assert format_reward(sample(good + "!"), pattern) == 0.0
    assert format_reward(sample(good, finish_reason="length"), pattern) == 0.0


TURNS = {
    "the template began it": ("a</think>7", "<think>a</think>7", r"<think>.*</think>(.*)"),
    "special tokens": ("a7", "a<answer>7</answer>", ".*<answer>(.*)</answer>"),
    "an open box": ("7}", r"So \boxed{7}", None),
}
"""Response, whole turn, and the pattern that a user would write."""


@pytest.mark.parametrize("name", TURNS)
def test_rewards_find_in_the_turn_what_the_response_lacks(sample: Sample, name: str) -> None:
    response, turn, pattern = TURNS[name]
    for judge in (exact_match, math_verify):
        assert judge(sample(response, turn=turn), pattern) == 1.0
        assert judge(sample(response, "8", turn=turn), pattern) == 0.0
        assert judge(sample(response), pattern) == float(judge is math_verify and pattern is None)
    whole = pattern or r".*\\boxed\{.*\}"
    assert format_reward(sample(response, turn=turn), whole) == 1.0
    assert format_reward(sample(response), whole) == 0.0
    assert format_reward(sample(response, turn=f"{turn}\n"), whole) == 0.0


def test_length_penalty_falls_linearly_over_the_buffer(sample: Sample) -> None:
    def at(num_tokens: int, **kwargs: str) -> float:
        return length_penalty(sample("x", num_tokens=num_tokens, **kwargs), buffer_tokens=20)

    assert [at(n) for n in (0, 80, 85, 90, 100)] == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert at(100, finish_reason="length") == -1.0
    with pytest.raises(ValueError, match="limit of 100 tokens"):
        length_penalty(sample("x"), buffer_tokens=101)


def test_reasoning_gym_needs_its_entry(sample: Sample) -> None:
    with pytest.raises(ValueError, match="problem p0 has no metadata"):
        reasoning_gym(sample(r"\boxed{7}"))
