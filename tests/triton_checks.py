"""What must hold of backend="triton" on any device, against float64 and autograd.

Each check takes the device: the CPU with Triton's interpreter at small sizes, or a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rlsd.ops import PolicyLossConfig, policy_loss, token_log_probs
from megatron_rlsd.ops.chunks import score_with_gradient
from megatron_rlsd.ops.head import HeadInputs, VocabShard
from megatron_rlsd.ops.reference import reference_log_probs, reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs
from megatron_rlsd.ops.triton_head import TritonChunk
from tests.rlsd_vectors import NEAR_THE_CURRENT, load_case, relative_error


def random_head(
    N: int, D: int, V: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets; logits have a standard deviation of 2."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device) * (2 / D**0.5)
    targets = torch.randint(V, (N,), generator=generator, device=device)
    return hidden.to(dtype), weight.to(dtype), targets


def random_tokens(hidden: Tensor, weight: Tensor, targets: Tensor, seed: int = 0) -> TokenInputs:
    """Log-probabilities near the current ones; a fifth of the rows masked, a fifth with A = 0."""
    N, device = targets.numel(), targets.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(N, generator=generator, device=device, dtype=torch.float64)

    def often() -> Tensor:
        return torch.rand(N, generator=generator, device=device) < 0.8

    log_probs, _ = reference_log_probs(hidden, weight, targets)
    near = {name: log_probs + 0.2 * normal() for name in NEAR_THE_CURRENT}
    return TokenInputs(
        advantages=normal() * often(), loss_weights=often().double() / max(N, 1), **near
    )


def log_prob_tolerance(device: torch.device, D: int) -> float:
    """Absolute error that a float32 log-probability may have from products over D numbers.

    Hopper's tensor cores cut partial sums where other units round them, so that the errors of
    D / 16 additions all lie on one side: 3.6e-5 at D 4096 on an H100.
    """
    return 1e-5 + (2e-8 * D if device.type == "cuda" else 0.0)


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check_scores(
    device: torch.device,
    dtype: torch.dtype,
    N: int,
    D: int,
    V: int,
    padding: int = 0,
    **settings: Any,
) -> None:
    """Log-probabilities close to float64 from the same inputs; padding holds infinities."""
    hidden, weight, targets = random_head(N, D, V, device, dtype)
    padded = torch.cat([weight, weight.new_full((padding, D), float("inf"))])
    scaling = {k: v for k, v in settings.items() if k in ("temperature", "softcap")}
    log_probs, entropy = token_log_probs(
        hidden, padded, targets, vocab_size=V, with_entropy=True, backend="triton", **settings
    )
    alone, _ = token_log_probs(hidden, padded, targets, vocab_size=V, backend="triton", **settings)
    exact, exact_entropy = reference_log_probs(hidden, weight, targets, **scaling)
    assert log_probs.dtype == torch.float32
    # Two compilations on a GPU, which may round a step differently.
    torch.testing.assert_close(alone, log_probs, rtol=1e-6, atol=2e-6 if alone.is_cuda else 0.0)
    atol = log_prob_tolerance(device, D)
    torch.testing.assert_close(log_probs.double(), exact, rtol=1e-6, atol=atol)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=atol)


def check_gradients(
    device: torch.device,
    dtype: torch.dtype,
    N: int,
    D: int,
    V: int,
    tolerance: float,
    padding: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> None:
    """Gradients of sum g log p + e H for random g and e, against autograd in float64.

    Errors are measured in what they would be if nothing cancelled, since at small shapes sums of a
    few terms of either sign can come out as close to 0 as they like.
    """
    hidden, weight, targets = random_head(N, D, V, device, dtype)
    padded = torch.cat([weight, weight.new_full((padding, D), float("inf"))])
    g, e = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).to(device)
    shard = VocabShard(padded, V, None)
    inputs = HeadInputs(hidden, targets, shard, temperature, softcap, True, chunk_tokens)
    d_weight = torch.zeros(padded.shape, device=device)
    ours = score_with_gradient(
        TritonChunk,
        inputs,
        torch.arange(N, device=device),
        lambda log_probs, entropy, span: g[span],
        e,
        want_d_hidden=True,
        d_weight=d_weight,
    )
    wide = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    log_probs, entropy = reference_log_probs(
        *wide, targets, temperature=temperature, softcap=softcap
    )
    expected = torch.autograd.grad((g * log_probs + e * entropy).sum(), wide)

    with torch.no_grad():
        logits = wide[0] @ wide[1].T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        p = (logits / temperature).softmax(-1)
        p[torch.arange(N, device=device), targets] += 1
        terms = p * (g.abs() + e.abs() * (1 + entropy))[:, None] / temperature
        sizes = (terms @ wide[1].abs()).norm(), (terms.T @ wide[0].abs()).norm()
    atol = log_prob_tolerance(device, D)
    torch.testing.assert_close(ours.log_probs.double(), log_probs, rtol=1e-6, atol=atol)
    assert (ours.d_hidden - expected[0]).norm() < tolerance * sizes[0]
    assert (d_weight[:V] - expected[1]).norm() < tolerance * sizes[1]
    assert not d_weight[V:].any()


def half_precision_errors(
    device: torch.device, dtype: torch.dtype, N: int, D: int, V: int, **settings: Any
) -> dict[str, tuple[float, float]]:
    """Of each result our relative error against float64, and that of eager full logits."""
    hidden, weight, targets = random_head(N, D, V, device, dtype, seed=5)
    tokens = random_tokens(hidden, weight, targets)
    config = PolicyLossConfig(kl_coef=0.02, entropy_coef=0.01, dual_clip=3.0)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    loss, stats = policy_loss(
        *leaves, targets, **vars(tokens) | settings, config=config, backend="triton"
    )
    wide = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    arguments: dict[str, Any] = {"tokens": tokens, "config": config}
    eager = reference_policy_loss(*leaves, targets, **arguments, dtype=torch.float32)
    exact = reference_policy_loss(*wide, targets, **arguments)
    exact_log_probs, _ = reference_log_probs(*wide, targets)
    eager_log_probs, _ = reference_log_probs(*leaves, targets, dtype=torch.float32)
    counted = tokens.loss_weights != 0
    expected = [exact_log_probs[counted], *torch.autograd.grad(exact, wide)]
    ours = [stats.log_probs[counted], *torch.autograd.grad(loss, leaves)]
    theirs = [eager_log_probs[counted], *torch.autograd.grad(eager, leaves)]
    assert ours[1].dtype == ours[2].dtype == dtype
    return {
        name: (relative_norm(a, c), relative_norm(b, c))
        for name, a, b, c in zip(
            ("log_probs", "d_hidden", "d_weight"), ours, theirs, expected, strict=True
        )
    }


def check_vectors(name: str, device: torch.device, chunk_tokens: int | None) -> None:
    """A published case in float32: loss, gradients, log-probabilities, entropy, gain, evidence."""
    case = load_case(name, torch.float32)
    arguments: dict[str, Any] = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.arguments.items()
    }
    hidden = case.hidden.to(device).requires_grad_()
    weight = case.weight.to(device).requires_grad_()
    loss, stats = policy_loss(
        hidden,
        weight,
        case.targets.to(device),
        **arguments,
        chunk_tokens=chunk_tokens,
        with_entropy=True,
        backend="triton",
    )
    loss.backward()
    rows = case.counted
    for actual, key in (
        (loss, "total_loss"),
        (hidden.grad, "d_hidden"),
        (weight.grad, "d_weight"),
        (stats.log_probs, "logp"),
        (stats.entropy, "entropy"),
        (stats.privileged_info_gain, "delta"),
        (stats.evidence_weight, "evidence"),
    ):
        actual, expected = actual.detach().cpu(), case.expected[key]
        if key in ("logp", "entropy", "delta", "evidence"):
            actual, expected = actual[rows], expected[rows]
        assert relative_error(actual, expected) < 1e-5, key


def check_extremes(device: torch.device, dtype: torch.dtype, scale: float) -> None:
    """scale 0: identical logits. 1e4: one token holds all probability (even rows), or none."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 8, generator=generator)
    targets = torch.randint(70, (12,), generator=generator)
    hidden = weight[targets] * scale
    hidden[1::2] *= -1
    constant = torch.full((12,), -3.0, device=device)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    loss, stats = policy_loss(
        *leaves,
        targets.to(device),
        advantages=torch.ones(12, device=device),
        loss_weights=torch.ones(12, device=device),
        ref_log_probs=constant,
        teacher_log_probs=constant,
        config=PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1),
        chunk_tokens=5,
        backend="triton",
    )
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        # The KL term pulls with up to e^20, which float16 has no number for.
        assert not leaf.grad.isnan().any() if dtype == torch.float16 else leaf.grad.isfinite().all()
    log_probs, entropy = reference_log_probs(*leaves, targets.to(device))
    torch.testing.assert_close(stats.log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-4, atol=1e-5)


def check_masked_columns(device: torch.device, dtype: torch.dtype) -> None:
    """Vocabulary rows whose logits overflow to -inf, a whole block of them, as if they were not."""
    kept, masked = 40, 100
    hidden, weight, targets = random_head(9, 8, kept, device, dtype)
    hidden = hidden.abs() + 2
    lowest = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).min
    lowest = max(lowest, torch.finfo(dtype).min)
    everything = torch.cat([weight, weight.new_full((masked, 8), lowest)])
    results = []
    for W in (weight, everything):
        leaves = (hidden.clone().requires_grad_(), W.clone().requires_grad_())
        loss, stats = policy_loss(
            *leaves,
            targets,
            advantages=torch.ones(9, device=device),
            loss_weights=torch.ones(9, device=device),
            config=PolicyLossConfig(entropy_coef=0.1),
            backend="triton",
        )
        loss.backward()
        results.append((stats.log_probs, stats.entropy, *(leaf.grad for leaf in leaves)))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip(*results, strict=True):
        # By size as a whole: single numbers are what is left of terms that cancel.
        assert (other[: len(one)] - one).norm() <= tolerance * one.norm() + 1e-6
        assert not other[len(one) :].any()


def check_d_weight_is_added_to(device: torch.device, dtype: torch.dtype) -> None:
    """In place, over several chunks; rows of padding keep what they held."""
    N, D, V, padding = 30, 24, 70, 6
    hidden, weight, targets = random_head(N, D, V + padding, device, dtype)
    targets %= V
    shard = VocabShard(weight, V, None)
    g = torch.linspace(-1, 1, N, device=device)
    before = torch.randn(V + padding, D, device=device)
    formed = []
    for start, chunk_tokens in ((torch.zeros_like(before), None), (before.clone(), 7)):
        inputs = HeadInputs(hidden, targets, shard, 1.0, None, False, chunk_tokens)
        result = score_with_gradient(
            TritonChunk,
            inputs,
            torch.arange(N, device=device),
            lambda log_probs, entropy, span: g[span],
            None,
            want_d_hidden=False,
            d_weight=start,
        )
        assert result.d_hidden is None
        formed.append(start)
    torch.testing.assert_close(formed[1] - before, formed[0], rtol=1e-2, atol=1e-3)
    assert torch.equal(formed[1][V:], before[V:])
    assert formed[0][:V].any()
