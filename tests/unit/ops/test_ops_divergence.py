"""Divergence over the vocabulary against full logits and autograd in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from megatron_rlsd.ops import BackendUnavailable, DivergenceConfig, divergence_loss
from tests.unit.ops.allocations import peak_allocated_bytes
from tests.unit.ops.products import Products

N, M, D, E, V = 23, 17, 6, 9, 50
CONFIGS = [
    DivergenceConfig("forward_kl"),
    DivergenceConfig("reverse_kl"),
    DivergenceConfig("jsd"),
    DivergenceConfig("jsd", jsd_beta=0.2),
    DivergenceConfig("jsd", top_k=7),
    DivergenceConfig("forward_kl", top_k=1),
    DivergenceConfig("reverse_kl", top_k=V),
    DivergenceConfig("jsd", confidence=1.0),
    DivergenceConfig("reverse_kl", top_k=7, confidence=0.3),
]


def problem(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    weights = torch.rand(M, generator=generator, dtype=torch.float64)
    weights[::5] = 0
    return {
        "hidden": normal(N, D).requires_grad_(),
        "weight": normal(V, D).requires_grad_(),
        "teacher_hidden": normal(M, E),
        "teacher_weight": normal(V, E),
        "rows": torch.randperm(N, generator=generator)[:M],
        "loss_weights": weights,
        "temperature": 0.7,
    }


def definition(inputs: dict[str, Any], config: DivergenceConfig) -> tuple[torch.Tensor, ...]:
    """The loss and the divergence of each row, by the formulas of the docstring."""
    T = inputs["temperature"]
    z = (inputs["hidden"].double() @ inputs["weight"].double().T / T)[inputs["rows"]]
    z_teacher = inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T / T
    if config.top_k is not None:
        chosen = z_teacher.topk(config.top_k, dim=1).indices
        z, z_teacher = z.gather(1, chosen), z_teacher.gather(1, chosen)
    p, q = z.softmax(1), z_teacher.softmax(1)
    if config.kind == "forward_kl":
        each = (q * (q.log() - p.log())).sum(1)
    elif config.kind == "reverse_kl":
        each = (p * (p.log() - q.log())).sum(1)
    else:
        b = config.jsd_beta
        m = b * q + (1 - b) * p
        each = (b * q * (q / m).log() + (1 - b) * p * (p / m).log()).sum(1)
    each = each * (config.confidence * (q * q.log()).sum(1)).exp()
    return (inputs["loss_weights"] * each).sum(), each.detach()


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_equals_full_logits_with_both_gradients(config, chunk_tokens):
    inputs = problem()
    leaves = [inputs["hidden"], inputs["weight"]]
    loss, divergence = divergence_loss(**inputs, config=config, chunk_tokens=chunk_tokens)
    expected, each = definition(inputs, config)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    counted = inputs["loss_weights"] != 0
    torch.testing.assert_close(divergence[counted], each[counted], rtol=1e-11, atol=1e-13)
    assert (divergence[~counted] == 0).all()
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=repr)
def test_gradient_is_that_of_central_differences(config):
    inputs = problem()
    others = {k: v for k, v in inputs.items() if k not in ("hidden", "weight")}

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return divergence_loss(hidden, weight, **others, config=config)[0]

    small = inputs["hidden"].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (small, inputs["weight"]), fast_mode=True)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_equal_distributions_have_no_divergence_and_no_gradient(config):
    inputs = problem()
    inputs["teacher_hidden"] = inputs["hidden"].detach()[inputs["rows"]]
    inputs["teacher_weight"] = inputs["weight"].detach()
    loss, divergence = divergence_loss(**inputs, config=config)
    assert divergence.abs().max() < 1e-14
    for gradient in torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]]):
        assert gradient.abs().max() < 1e-14


def test_jsd_is_bounded_and_symmetric_at_one_half():
    inputs = problem(scale=4.0)
    _, one = divergence_loss(**inputs, config=DivergenceConfig("jsd"))
    turned = inputs | {
        "hidden": inputs["teacher_hidden"],
        "weight": inputs["teacher_weight"],
        "teacher_hidden": inputs["hidden"].detach()[inputs["rows"]],
        "teacher_weight": inputs["weight"].detach(),
        "rows": torch.arange(M),
    }
    _, other = divergence_loss(**turned, config=DivergenceConfig("jsd"))
    torch.testing.assert_close(one, other)
    assert 0.5 < one.max() <= torch.tensor(2.0).log()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_huge_logits_and_bfloat16_stay_finite_and_close(config):
    huge = problem(torch.float32, scale=100.0)
    loss, _ = divergence_loss(**huge, config=config)
    loss.backward()
    for tensor in (loss, huge["hidden"].grad, huge["weight"].grad):
        assert tensor.isfinite().all()
    inputs = problem(torch.bfloat16)
    loss, _ = divergence_loss(**inputs, config=config)
    expected, _ = definition(inputs, config)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"])
    (reference,) = torch.autograd.grad(expected, inputs["hidden"])
    torch.testing.assert_close(gradient.double(), reference.double(), rtol=1e-2, atol=1e-3)


def test_padded_vocabulary_rows_take_no_part():
    inputs = problem()
    expected, _ = divergence_loss(**inputs, config=DivergenceConfig(top_k=5))
    for name in ("weight", "teacher_weight"):
        padding = torch.full((6, inputs[name].shape[1]), 1e9, dtype=torch.float64)
        inputs[name] = torch.cat([inputs[name].detach(), padding]).requires_grad_()
    loss, _ = divergence_loss(**inputs, config=DivergenceConfig(top_k=5), vocab_size=V)
    assert loss == expected
    (gradient,) = torch.autograd.grad(loss, inputs["weight"])
    assert (gradient[V:] == 0).all()


def test_main_grad_and_grad_scale():
    inputs = problem()
    config = DivergenceConfig("reverse_kl")
    loss, _ = divergence_loss(**inputs, config=config)
    d_hidden, d_weight = torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])
    main_grad = torch.ones(V, D, dtype=torch.float64)
    loss, _ = divergence_loss(**inputs, config=config, weight_main_grad=main_grad, grad_scale=8.0)
    (loss * 8.0).backward()
    torch.testing.assert_close(inputs["hidden"].grad, 8 * d_hidden)
    torch.testing.assert_close(main_grad, 1 + 8 * d_weight)


def test_four_products_over_counted_rows_alone_and_no_full_logits():
    inputs = problem(torch.float32)
    counted = int((inputs["loss_weights"] != 0).sum())
    with Products() as seen:
        divergence_loss(**inputs, config=DivergenceConfig())
    forward = [rows for name, rows in seen.products]
    assert forward == [counted, counted, counted, V]

    def call(M: int) -> object:
        few = problem(torch.float32)
        rows = torch.arange(M)
        wide = torch.randn(20_000, D).requires_grad_()
        loss, _ = divergence_loss(
            torch.randn(M, D).requires_grad_(),
            wide,
            few["teacher_hidden"][:1].expand(M, E),
            torch.randn(20_000, E),
            rows,
            loss_weights=torch.ones(M),
            config=DivergenceConfig(),
            chunk_tokens=16,
        )
        return loss

    small, large = (peak_allocated_bytes(partial(call, M)) for M in (32, 320))
    assert large - small < 288 * (4 * D * 4 + 200)


@pytest.mark.parametrize("config", CONFIGS[:5], ids=repr)
def test_a_chunk_stays_within_its_budget(config):
    V_big, rows = 20_000, 600
    generator = torch.Generator().manual_seed(0)

    def call() -> object:
        loss, _ = divergence_loss(
            torch.randn(rows, D, generator=generator).requires_grad_(),
            torch.randn(V_big, D, generator=generator).requires_grad_(),
            torch.randn(rows, E, generator=generator),
            torch.randn(V_big, E, generator=generator),
            torch.arange(rows),
            loss_weights=torch.ones(rows),
            config=config,
        )
        return loss

    own = 4 * V_big * (2 * D + E) + 4 * rows * (3 * D + E)  # the inputs, and the gradients
    peak = peak_allocated_bytes(call)
    assert 20 * 2**20 < peak - own < 42 * 2**20  # both logits would be 92 MiB


def test_nothing_counted_and_nothing_given():
    inputs = problem()
    for changes in (
        {"loss_weights": torch.zeros(M)},
        {
            "teacher_hidden": torch.zeros(0, E, dtype=torch.float64),
            "rows": torch.zeros(0, dtype=torch.int64),
            "loss_weights": torch.zeros(0),
        },
    ):
        loss, _ = divergence_loss(**inputs | changes, config=DivergenceConfig())
        loss.backward()
        assert loss == 0
        assert not inputs["hidden"].grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": torch.zeros(V - 1, E)}, "the student's vocabulary rows"),
        ({"teacher_hidden": torch.zeros(M, E - 1)}, "teacher_hidden must be"),
        ({"rows": torch.zeros(M - 1, dtype=torch.int64)}, "rows .* must have shape"),
        ({"loss_weights": torch.zeros(M + 1)}, "loss_weights must have shape"),
        ({"config": DivergenceConfig(top_k=V + 1)}, "more than the vocabulary"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        divergence_loss(**{**problem(), "config": DivergenceConfig(), **changes})


def test_settings_out_of_range_and_the_missing_backend_are_named():
    for setting, message in (
        ({"kind": "tv"}, "kind must be"),
        ({"jsd_beta": 1.0}, "jsd_beta must be"),
        ({"top_k": 0}, "top_k must be"),
    ):
        with pytest.raises(ValueError, match=message):
            DivergenceConfig(**setting)
    with pytest.raises(BackendUnavailable, match="run on the torch backend alone"):
        divergence_loss(**problem(), config=DivergenceConfig(), backend="triton")
