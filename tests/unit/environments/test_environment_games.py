"""The shipped environments turn by turn, and the game's problems."""

from __future__ import annotations

import pytest

from megatron_rlsd.config import GuessingGameSource
from megatron_rlsd.data import evaluation_problems
from megatron_rlsd.environments import ENVIRONMENTS, Observation
from megatron_rlsd.environments.calculator import Calculator
from megatron_rlsd.environments.guessing_game import GuessingGame
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

PRODUCT = Problem("p", ({"role": "user", "content": "12 * 7 + 1?"},), "85")


def game(low: int = 1, high: int = 100, seed: int = 0, size: int = 50) -> list[Problem]:
    source = GuessingGameSource(kind="guessing_game", low=low, high=high, seed=seed, size=size)
    return evaluation_problems(source, size)


def test_the_calculator_answers_calls_and_judges_the_turn_without_one():
    tool = Calculator(pattern="#### (.*)", instruction="Use <calc>.")
    assert tool.reset(PRODUCT) == "Use <calc>."
    assert tool.step("I need <calc>12 * 7</calc>") == Observation("84")
    two = tool.step("#### 85 <calc>84+1</calc> and <calc>84/0</calc>")
    assert two == Observation("85\nerror: division by zero")
    assert tool.step("So #### 85.0") == Observation(done=True, reward=1.0)
    assert tool.step("So #### 84") == Observation(done=True, reward=0.0)
    assert tool.step("<calc>1</calc") == Observation(done=True, reward=0.0)
    assert tool.step("<calc>1</calc>" * 9).text.splitlines()[8:] == [
        "error: only 8 calls in a turn are answered"
    ]


def test_guesses_are_answered_and_the_reward_falls_with_the_turns():
    problem = Problem(
        "g",
        PRODUCT.messages,
        "37",
        metadata={"guessing_game": {"low": 1, "high": 50, "secret": 37}},
    )
    player = GuessingGame(turn_penalty=0.25)
    player.reset(problem)
    answers = [
        player.step(f"<guess>{text}</guess>").text for text in ("25", " 43 ", "51", "x", "9" * 5000)
    ]
    assert answers[:4] == ["higher", "lower", "It is from 1 to 50.", "That is no guess."]
    assert player.step("37").text == "That is no guess."
    # Six turns before it.
    assert player.step("<guess>1</guess><guess>37</guess>") == Observation(done=True, reward=0.0)
    early = GuessingGame(turn_penalty=0.25)
    early.reset(problem)
    early.step("<guess>1</guess>")
    assert early.step("<guess>37</guess>") == Observation(done=True, reward=0.75)
    with pytest.raises(ValueError, match=r"problem p has no metadata\['guessing_game'\]"):
        GuessingGame().reset(PRODUCT)


def test_the_games_problems_are_seeded_and_their_solutions_win():
    problems = game(low=-5, high=94)
    assert problems == game(low=-5, high=94)
    assert problems != game(low=-5, high=94, seed=1)
    assert len({p.answer for p in problems}) > 20
    for problem in problems:
        player = GuessingGame()
        player.reset(problem)
        lines = problem.reference_solution.splitlines()
        assert len(lines) <= 7  # ceil(log2(100))
        for line in lines:
            guess, answer = line.split(": ")
            assert problem.answer in line or answer != "correct"
            seen = player.step(f"<guess>{guess}</guess>")
            assert (seen.text or "correct") == answer
        assert seen == Observation(done=True, reward=1.0)
        assert problem.answer not in problem.messages[0]["content"].split()


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(UserError, match=r"guessing_game.*turn_penalty must lie in \[0, 1\]"):
        ENVIRONMENTS.locate("guessing_game", {"turn_penalty": 2})
    with pytest.raises(UserError, match=r"calculator.*has no group"):
        ENVIRONMENTS.locate("calculator", {"pattern": "x"})
    with pytest.raises(UserError, match=r"calculator.*'<<' has no group"):
        ENVIRONMENTS.locate("calculator", {"call": "<<"})
    with pytest.raises(UserError, match=r"cannot be made with params.*'colour'"):
        ENVIRONMENTS.locate("calculator", {"colour": 1})
    with pytest.raises(UserError, match="known environments: calculator, guessing_game"):
        ENVIRONMENTS.locate("chess", {})


def test_contradictory_configurations_are_refused(make_config):
    game_source = {"kind": "guessing_game"}
    with pytest.raises(UserError, match="low < high, got low=5 and high=5"):
        make_config(data={"train": [{**game_source, "low": 5, "high": 5}]})
    with pytest.raises(UserError, match=r"reward environment needs environment\.name"):
        make_config(reward={"functions": [{"name": "environment"}]})
