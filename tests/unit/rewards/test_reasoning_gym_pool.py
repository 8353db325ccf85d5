from __future__ import annotations

from collections.abc import Callable

import pytest
import reasoning_gym

from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.types import RewardInput

pytestmark = pytest.mark.process

# gsm_symbolic and friends, and those whose entries hold more than text (boards, graphs, dates).
TASKS = [
    "gsm_symbolic",
    "basic_arithmetic",
    "chain_sum",
    "leg_counting",
    "prime_factorization",
    "fraction_simplification",
    "gcd",
    "lcm",
    "countdown",
    "polynomial_equations",
    "simple_equations",
    "complex_arithmetic",
    "calendar_arithmetic",
    "time_intervals",
    "knights_knaves",
    "sudoku",
    "n_queens",
    "arc_1d",
    "rearc",
    "word_ladder",
    "maze",
    "letter_counting",
    "spell_backward",
    "shortest_path",
    "family_relationships",
]


def test_reference_answers_score_1_and_others_do_not(
    sample: Callable[..., RewardInput], pool: Callable[..., RewardPool]
) -> None:
    samples = []
    for task in TASKS:
        entry = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
        metadata = {"reasoning_gym": {"task": task, "entry": entry}}
        for answer in (entry["answer"], "a wrong answer"):
            response = f"I think <answer>{answer}</answer>"
            samples.append(sample(response, entry["answer"], id=task, metadata=metadata))
        samples.append(sample("no answer", entry["answer"], id=task, metadata=metadata))
    scorer = {"name": "reasoning_gym", "params": {"pattern": "(?s)<answer>(.*)</answer>"}}
    results = pool(scorer, memory_limit_bytes=4 << 30, on_error="stop").score(samples)
    values = [result.value for result in results]
    assert dict(zip(TASKS, values[0::3], strict=True)) == dict.fromkeys(TASKS, 1.0)
    assert max(values[1::3]) < 1.0
    assert set(values[2::3]) == {0.0}


@pytest.mark.parametrize("as_text", [True, False])
def test_default_extraction_is_the_last_box(
    sample: Callable[..., RewardInput], pool: Callable[..., RewardPool], as_text: bool
) -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    metadata = {"reasoning_gym": {"task": "chain_sum", "entry": entry}}
    response = rf"\boxed{{{entry['answer']}}}" if not as_text else f"it is {entry['answer']}"
    [result] = pool("reasoning_gym").score([sample(response, metadata=metadata)])
    assert result.value == (0.0 if as_text else 1.0)


def test_an_entry_that_breaks_the_scorer_is_an_error(
    sample: Callable[..., RewardInput], pool: Callable[..., RewardPool]
) -> None:
    entry = {"question": "?", "answer": "2 and 3", "metadata": {}}
    metadata = {"reasoning_gym": {"task": "prime_factorization", "entry": entry}}
    scorer = pool("reasoning_gym", max_error_share=1)
    [result] = scorer.score([sample(r"\boxed{7}", metadata=metadata)])
    assert "invalid literal for int" in result.errors["reasoning_gym"]
