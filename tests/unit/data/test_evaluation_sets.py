from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsd.config import GuessingGameSource, JsonlSource, ReasoningGymSource
from megatron_rlsd.data.evaluation_sets import evaluation_sets, set_names
from megatron_rlsd.runtime.errors import UserError


def jsonl(path: str, name: str | None = None) -> JsonlSource:
    return JsonlSource(kind="jsonl", path=path, name=name)


def gym(task: str = "chain_sum", name: str | None = None, seed: int = 0) -> ReasoningGymSource:
    return ReasoningGymSource(kind="reasoning_gym", task=task, name=name, seed=seed)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([jsonl("a/gsm8k/test.jsonl"), jsonl("a/math/test.jsonl")], ["gsm8k-test", "math-test"]),
        ([jsonl("x/aime.jsonl"), jsonl("a/gsm8k/eval.jsonl")], ["aime", "gsm8k-eval"]),
        ([jsonl("x/24/aime.jsonl"), jsonl("x/25/aime.jsonl")], ["24-aime", "25-aime"]),
        ([jsonl("x/1/a/b.jsonl"), jsonl("x/2/a/b.jsonl")], ["1-a-b", "2-a-b"]),
        ([jsonl("x/my set/test.jsonl"), jsonl("d/a=1.jsonl")], ["my_set-test", "a_1"]),
        ([jsonl("x/a.jsonl"), jsonl("x/a.jsonl"), jsonl("x/a.jsonl")], ["a", "a.2", "a.3"]),
        ([gym(seed=1), gym(seed=2), gym("products")], ["chain_sum", "chain_sum.2", "products"]),
        ([gym(), jsonl("d/chain_sum.jsonl")], ["chain_sum", "d-chain_sum"]),
        ([jsonl("x/a.2.jsonl"), jsonl("y/a.jsonl"), jsonl("y/a.jsonl")], ["a.2", "a", "a.3"]),
        ([jsonl("a/test.jsonl", "hard"), gym(name="easy")], ["hard", "easy"]),
        ([GuessingGameSource(kind="guessing_game")], ["guessing_game"]),
    ],
)
def test_each_set_has_a_name_that_tells_it_apart(sources: list, names: list[str]) -> None:
    assert set_names(sources) == names


def test_two_sets_of_one_given_name_are_refused() -> None:
    with pytest.raises(UserError, match="two evaluation sources have the name 'hard'"):
        set_names([jsonl("a.jsonl", "hard"), gym(name="hard")])


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a=b"])
def test_a_name_must_fit_into_a_metrics_name(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        jsonl("a.jsonl", name)


def test_problems_by_name_and_all_of_them_without_a_number(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}+1", "answer": {n + 1}}}\n' for n in range(5)))
    sets = evaluation_sets([jsonl(str(file)), gym(name="easy")], 3)
    assert {name: len(problems) for name, problems in sets.items()} == {"sums": 3, "easy": 3}
    assert {problem.source for problem in sets["easy"]} == {"easy"}
    assert len(evaluation_sets([jsonl(str(file))], None)["sums"]) == 5
