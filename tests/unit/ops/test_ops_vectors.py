"""The loss, its gradients and its parts against the 16 published float64 cases."""

from __future__ import annotations

import pytest
import torch

from megatron_rlsd.ops import policy_loss, token_log_probs
from megatron_rlsd.ops.token_loss import TokenInputs, token_loss
from tests.rlsd_vectors import CASES, load_case, relative_error

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, None])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, chunk_tokens, dtype, tolerance):
    case = load_case(name, dtype)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    loss, stats = policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        **case.arguments,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
    )
    loss.backward()

    assert loss.dtype == dtype
    assert relative_error(loss, case.expected["total_loss"]) < tolerance
    assert relative_error(case.hidden.grad, case.expected["d_hidden"]) < tolerance
    assert relative_error(case.weight.grad, case.expected["d_weight"]) < tolerance
    for actual, key in (
        (stats.log_probs, "logp"),
        (stats.entropy, "entropy"),
        (stats.privileged_info_gain, "delta"),
        (stats.evidence_weight, "evidence"),
    ):
        rows = case.counted
        assert relative_error(actual[rows], case.expected[key][rows]) < tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_parts_of_each_token(name):
    case = load_case(name, torch.float64)
    arguments = dict(case.arguments)
    config, _ = arguments.pop("config"), arguments.pop("temperature")
    losses = token_loss(
        case.expected["logp"], case.expected["entropy"], TokenInputs(**arguments), config
    )
    for actual, key in (
        (losses.loss, "loss"),
        (losses.advantages, "advantage"),
        (losses.ratio, "ratio"),
        (losses.clipped_evidence_weight, "evidence_clipped"),
    ):
        torch.testing.assert_close(actual, case.expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_token_log_probs(name, dtype, tolerance):
    case = load_case(name, dtype)
    log_probs, entropy = token_log_probs(
        case.hidden,
        case.weight,
        case.targets,
        temperature=case.arguments["temperature"],
        with_entropy=True,
        chunk_tokens=7,
    )
    assert log_probs.dtype == dtype
    assert relative_error(log_probs, case.expected["logp"]) < tolerance
    assert relative_error(entropy, case.expected["entropy"]) < tolerance
