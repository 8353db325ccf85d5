"""The fused head on a CUDA device: both backends against float64, and what only a device has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rlsd.ops import PolicyLossConfig, backend_choice, policy_loss, token_log_probs
from megatron_rlsd.ops.reference import reference_log_probs, reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs
from tests.rlsd_vectors import CASES, load_case, relative_error
from tests.triton_checks import log_prob_tolerance

BACKENDS = ["torch", "triton"]
GIB = 2**30
CONFIG = PolicyLossConfig(kl_coef=0.02, dual_clip=3.0)


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 off, as it is by default."""
    assert torch.get_float32_matmul_precision() == "highest"


def problem(N: int, D: int, V: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden, weight = normal(N, D).to(dtype), (normal(V, D) * 2 / D**0.5).to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device="cuda")
    log_probs, _ = reference_log_probs(hidden, weight, targets)
    names = ("old_log_probs", "teacher_log_probs", "ref_log_probs")
    near = {name: (log_probs + 0.2 * normal(N)).float() for name in names}
    advantages = normal(N) * (normal(N) > -1)
    weights = (normal(N) > -1).float() / max(N, 1)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": targets,
        "tokens": TokenInputs(advantages=advantages, loss_weights=weights, **near),
    }


def call(inputs: dict[str, Any], **options: Any) -> Any:
    tensors = inputs["hidden"], inputs["weight"], inputs["targets"]
    return policy_loss(*tensors, **{"config": CONFIG, **vars(inputs["tokens"]), **options})


def errors(inputs: dict[str, Any], config: PolicyLossConfig = CONFIG, **options: Any) -> Any:
    """For ours and for full logits: relative errors of loss and gradients against float64."""
    leaves: tuple[torch.Tensor, torch.Tensor] = (inputs["hidden"], inputs["weight"])
    scaling = {k: v for k, v in options.items() if k in ("softcap", "temperature", "sequence_ids")}

    def reference(h: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        loss = reference_policy_loss(
            h,
            w,
            inputs["targets"],
            tokens=inputs["tokens"],
            config=config,
            dtype=dtype,
            **scaling,
        )
        return [loss.detach(), *torch.autograd.grad(loss, [h, w])]

    hidden, weight = (x.detach().double().requires_grad_() for x in leaves)
    exact = reference(hidden, weight, torch.float64)
    eager = reference(*leaves, torch.float32)
    loss, _ = call(inputs, config=config, **options)
    ours = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return [
        [float((x.double() - e).norm() / e.norm()) for x, e in zip(values, exact, strict=True)]
        for values in (ours, eager)
    ]


def test_auto_takes_triton_from_compute_capability_8_on(cuda):
    choice = backend_choice(cuda, torch.bfloat16)
    print(choice.reason)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choice.name == "triton", choice.reason
    assert backend_choice(cuda, torch.float64).name == "torch"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_vectors(name, backend):
    case = load_case(name, torch.float32)
    hidden, weight = case.hidden.cuda().requires_grad_(), case.weight.cuda().requires_grad_()
    arguments: dict[str, Any] = {
        k: v.cuda() if torch.is_tensor(v) else v for k, v in case.arguments.items()
    }
    loss, stats = policy_loss(
        hidden, weight, case.targets.cuda(), **arguments, backend=backend, with_entropy=True
    )
    loss.backward()
    for actual, key in (
        (loss.detach(), "total_loss"),
        (hidden.grad, "d_hidden"),
        (weight.grad, "d_weight"),
    ):
        assert relative_error(actual.cpu(), case.expected[key]) < 1e-5, key
    for actual, key in ((stats.log_probs, "logp"), (stats.entropy, "entropy")):
        rows = case.counted
        assert relative_error(actual.cpu()[rows], case.expected[key][rows]) < 1e-5, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(512, 256, 5000), (77, 72, 1283), (1, 128, 32000)])
def test_no_worse_than_full_logits(shape: tuple[int, int, int], dtype, backend):
    ours, eager = errors(problem(*shape, dtype), backend=backend)
    print(shape, dtype, "ours", [f"{e:.1e}" for e in ours], "eager", [f"{e:.1e}" for e in eager])
    for name, mine, theirs in zip(("loss", "d_hidden", "d_weight"), ours, eager, strict=True):
        assert mine <= 1.1 * theirs + 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_keep_float32_precision(dtype, backend):
    inputs = problem(300, 512, 50_000, dtype)
    arguments = inputs["hidden"], inputs["weight"], inputs["targets"]
    exact, exact_entropy = reference_log_probs(*arguments)
    log_probs, entropy = token_log_probs(*arguments, backend=backend, with_entropy=True)
    error = float((log_probs - exact).abs().max())
    print(dtype, f"{error:.1e}")
    assert error < log_prob_tolerance(inputs["hidden"].device, 512)
    assert float((entropy - exact_entropy).abs().max()) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_entropy_and_ratios_of_responses(backend):
    inputs = problem(200, 96, 3000, torch.float32)
    config = PolicyLossConfig(importance_ratio="sequence", entropy_coef=0.05, eps_clip_low=0.05)
    ours, _ = errors(
        inputs,
        config,
        backend=backend,
        softcap=3.0,
        temperature=0.7,
        sequence_ids=torch.arange(200, device="cuda") // 9,
    )
    assert max(ours) < 1e-5, ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_flat_and_huge_logits_stay_finite(scale, backend):
    inputs = problem(40, 16, 300, torch.bfloat16)
    inputs["hidden"] = (inputs["hidden"].detach() * scale).requires_grad_()
    loss, stats = call(inputs, backend=backend, with_entropy=True)
    loss.backward()
    assert loss.isfinite()
    assert stats.sum_vector.isfinite().all()
    assert inputs["hidden"].grad.isfinite().all()
    assert inputs["weight"].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    inputs = problem(0, 16, 300, torch.bfloat16)
    loss, _ = call(inputs, backend=backend)
    loss.backward()
    assert loss == 0
    assert not inputs["weight"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_takes_the_gradient_and_the_empty_one_adds_nothing(backend):
    inputs = problem(64, 128, 2000, torch.bfloat16)
    loss, _ = call(inputs, backend=backend)
    (plain,) = torch.autograd.grad(loss, [inputs["weight"]])
    main_grad = torch.ones(2000, 128, device="cuda")
    loss, _ = call(inputs, backend=backend, weight_main_grad=main_grad, grad_scale=4.0)
    (4 * loss).backward()
    torch.testing.assert_close(main_grad - 1, 4 * plain.float(), rtol=2e-2, atol=1e-4)
    before = main_grad.clone()
    main_grad.add_(inputs["weight"].grad.data)  # as Megatron's hook does
    assert torch.equal(main_grad, before)
    assert inputs["hidden"].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_scale_than_announced_is_nan_and_not_wrong(backend):
    inputs = problem(8, 16, 300, torch.float32)
    main_grad = torch.zeros(300, 16, device="cuda")
    loss, _ = call(inputs, backend=backend, weight_main_grad=main_grad, grad_scale=2.0)
    loss.backward()
    assert inputs["hidden"].grad.isnan().all()


@pytest.mark.whole_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_need_no_more_memory_than_their_own_gradients(backend):
    D, V = 1024, 151_936

    def extra(N: int) -> int:
        hidden = torch.randn(N, D, device="cuda").bfloat16().requires_grad_()
        ones = torch.ones(N, device="cuda")
        tokens = TokenInputs(advantages=ones, loss_weights=ones)
        targets = torch.randint(V, (N,), device="cuda")
        inputs = {"hidden": hidden, "weight": weight, "targets": targets, "tokens": tokens}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = call(
            inputs, config=PolicyLossConfig(), backend=backend, weight_main_grad=main_grad
        )
        loss.backward()
        return torch.cuda.max_memory_allocated() - before

    weight = torch.randn(V, D, device="cuda").bfloat16().mul_(0.05).requires_grad_()
    main_grad = torch.zeros(V, D, device="cuda")
    few, many = extra(16384), extra(65536)
    print(f"{backend}: {few / GIB:.2f} GiB at 16384 rows, {many / GIB:.2f} GiB at 65536")
    per_row = D * (4 + 2 + 2) + 400  # d_hidden in float32 and bfloat16, gathered rows, numbers
    assert many - few < (65536 - 16384) * per_row
    assert many < 2 * GIB
