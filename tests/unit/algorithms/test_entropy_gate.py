"""AntiSD's switch."""

from __future__ import annotations

import pytest
import torch

from megatron_rlsd.algorithms import ScoredResponse, Variant, register_algorithm
from megatron_rlsd.algorithms.rules.antisd import EntropyGate, opposed_credit
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.runtime.errors import UserError


def algorithm(**params: float) -> AlgorithmConfig:
    return AlgorithmConfig(name="antisd", params=params)


def test_it_closes_below_one_bound_and_opens_above_another() -> None:
    gate = EntropyGate(algorithm(warmup=3))
    seen = []
    # The median of the warm-up is 1.0, so the bounds are .93 and 1.07.
    for entropy in (0.2, 1.0, 5.0, 0.94, 0.92, 1.0, 1.07, 1.08, 1.0, 0.93, 0.9):
        gate.observe(entropy)
        seen.append(gate.is_open)
    assert seen == [True, True, True, True, False, False, False, True, True, True, False]
    other = EntropyGate(algorithm(warmup=3))
    other.load_state(gate.state())
    for each in (gate, other):
        each.observe(1.0)
        assert not each.is_open
        each.observe(1.1)
        assert each.is_open


@pytest.mark.parametrize("params", [{"warmup": 0}, {"low": 1.2}, {"low": 0}])
def test_bounds_that_make_no_switch_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected warmup >= 1 and 0 < low <= high"):
        EntropyGate(algorithm(**params))


def test_a_gate_without_an_entropy_to_observe_is_refused() -> None:
    with pytest.raises(UserError, match="does not read teacher_entropy"):
        register_algorithm("own", Variant(), token_credit=opposed_credit, gate=EntropyGate)


def test_closed_or_without_a_score_the_advantage_stays() -> None:
    def credit(gains: list[float], is_open: bool) -> list[float]:
        response = ScoredResponse(
            advantage=-0.5,
            rlsd_lambda=1.0,
            log_probs=torch.zeros(len(gains)),
            teacher_log_probs=torch.tensor(gains),
            contrast_log_probs=None,
            turns=[],
            group_solved_share=None,
            is_gate_open=is_open,
        )
        found = opposed_credit(response, algorithm())
        assert isinstance(found, torch.Tensor)
        return found.tolist()

    assert credit([1.0, -1.0], is_open=False) == [-0.5, -0.5]
    assert credit([float("nan")], is_open=True) == [-0.5]
    likely, unlikely, outside = credit([1.0, -1.0, float("nan")], is_open=True)
    assert likely < -0.5 < unlikely
    assert outside == -0.5
