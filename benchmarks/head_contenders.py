"""The ways to log-probabilities or to the policy loss that benchmarks/fused_head.py compares.

Each contender's ``prepare`` imports what it needs and returns a function of a Problem, or raises
Skip with the reason. Log-probability contenders return them [N]; loss contenders return the loss
and leave gradients in ``problem.hidden.grad`` and ``problem.weight.grad``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlsd.ops import PolicyLossConfig, backend_choice, policy_loss, token_log_probs
from megatron_rlsd.ops.backends import BackendName
from megatron_rlsd.ops.token_loss import TokenInputs, token_loss

CONFIG = PolicyLossConfig()
SEQUENCE_CONFIG = replace(CONFIG, importance_ratio="sequence")
RESPONSE_TOKENS = 256


class Skip(Exception):
    """This contender cannot run here; the message says why."""


@dataclass
class Problem:
    """One set of inputs; a contender may run on several, in turn."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    tokens: TokenInputs
    sequence_ids: Tensor
    main_grad: Tensor
    """float32 [V, D], there before the contender runs, as in training."""

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_problem(
    N: int, D: int, V: int, active: float, dtype: torch.dtype, device: torch.device, seed: int
) -> Problem:
    """Hidden states of unit scale, logits of a standard deviation of 2, a share of rows with A."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(N, D).to(dtype).requires_grad_()
    weight = normal(V, D).mul_(2 / D**0.5).to(dtype).requires_grad_()
    rank = torch.rand(N, generator=generator, device=device).argsort().argsort()
    near = normal(N) * 0.1 - 14.0
    tokens = TokenInputs(
        advantages=normal(N) * (rank < round(active * N)),
        loss_weights=torch.full((N,), 1 / N, device=device),
        old_log_probs=near,
        teacher_log_probs=near + 0.2 * normal(N),
    )
    targets = torch.randint(V, (N,), generator=generator, device=device)
    ids = torch.arange(N, device=device) // RESPONSE_TOKENS
    main_grad = torch.zeros(V, D, device=device)
    return Problem(hidden, weight, targets, tokens, ids, main_grad)


Run = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Contender:
    name: str
    task: str
    """log_probs, or loss (with both gradients)."""
    computes: str
    prepare: Callable[[torch.device, torch.dtype], Run]
    into_main_grad: bool = False


def rlsd_backward(log_probs: Tensor, problem: Problem) -> Tensor:
    """The policy loss of log-probabilities that autograd can follow."""
    tokens = problem.tokens
    losses = token_loss(log_probs.float(), None, tokens, CONFIG)
    loss = (tokens.loss_weights * losses.loss).sum()
    loss.backward()
    return loss.detach()


# --- ours


def ours_loss(
    backend: BackendName, into_main_grad: bool, **options: Any
) -> Callable[[torch.device, torch.dtype], Run]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Run:
        _check_backend(backend, device, dtype)

        def run(problem: Problem) -> Tensor:
            arguments: dict[str, Any] = {"config": CONFIG} | options
            loss, _ = policy_loss(
                problem.hidden,
                problem.weight,
                problem.targets,
                **vars(problem.tokens),
                sequence_ids=problem.sequence_ids,
                weight_main_grad=problem.main_grad if into_main_grad else None,
                backend=backend,
                **arguments,
            )
            if loss.requires_grad:
                loss.backward()
            return loss.detach()

        return run

    return prepare


def ours_log_probs(backend: BackendName) -> Callable[[torch.device, torch.dtype], Run]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Run:
        _check_backend(backend, device, dtype)
        return lambda p: token_log_probs(p.hidden, p.weight, p.targets, backend=backend)[0]

    return prepare


def _check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    choice = backend_choice(device, dtype)
    if backend == "triton" and choice.name != "triton":
        raise Skip(choice.reason)
    if backend == "torch" and choice.name == "triton":
        raise Skip("triton runs here; the torch backend is for where it does not")


# --- plain torch


def eager_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def full_logits(device: torch.device, dtype: torch.dtype) -> Run:
    return lambda p: rlsd_backward(eager_log_probs(p.hidden, p.weight, p.targets), p)


def full_logits_log_probs(device: torch.device, dtype: torch.dtype) -> Run:
    def run(problem: Problem) -> Tensor:
        with torch.no_grad():
            return eager_log_probs(problem.hidden, problem.weight, problem.targets)

    return run


def compiled_chunks(device: torch.device, dtype: torch.dtype) -> Run:
    """Backward after each chunk, so its logits are gone before the next; compiled by inductor."""
    compiled, rows = _compiled(eager_log_probs, device, dtype)

    def run(problem: Problem) -> Tensor:
        total = torch.zeros((), device=device)
        for start in range(0, len(problem.targets), rows):
            part = slice(start, start + rows)
            log_probs = compiled(problem.hidden[part], problem.weight, problem.targets[part])
            tokens = problem.tokens.select(part)
            loss = (tokens.loss_weights * token_loss(log_probs, None, tokens, CONFIG).loss).sum()
            loss.backward()
            total += loss.detach()
        return total

    return run


def compiled_chunks_log_probs(device: torch.device, dtype: torch.dtype) -> Run:
    compiled, rows = _compiled(eager_log_probs, device, dtype)

    def run(problem: Problem) -> Tensor:
        with torch.no_grad():
            parts = zip(problem.hidden.split(rows), problem.targets.split(rows), strict=True)
            return torch.cat([compiled(h, problem.weight, y) for h, y in parts])

    return run


def _compiled(
    function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], int]:
    compiled = torch.compile(function, dynamic=False)
    try:
        inputs = torch.zeros(2, 8, device=device, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
        compiled(inputs[0], inputs[1].to(device), torch.zeros(2, dtype=torch.int64, device=device))
    except Exception as error:
        raise Skip(f"torch.compile does not work here: {str(error).splitlines()[0]}") from error
    return compiled, 256 if device.type == "cpu" else 2048


def torch_linear_cross_entropy(device: torch.device, dtype: torch.dtype) -> Run:
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def run(problem: Problem) -> Tensor:
        loss = F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, options=options
        )
        loss.backward()
        return loss.detach()

    return run


# --- other projects


def _require(package: str, device: torch.device, on_cpu: bool = False) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Skip(f"{package} is not installed") from None
    if device.type == "cpu" and not on_cpu:
        raise Skip(f"{package} has CUDA kernels only")


def _log_prob_runs(
    load: Callable[[torch.device], Callable[[Problem], Tensor]], with_gradient: bool
) -> Callable[[torch.device, torch.dtype], Run]:
    """A contender of either task from a function that gives differentiable log-probabilities."""

    def prepare(device: torch.device, dtype: torch.dtype) -> Run:
        log_probs = load(device)

        def run(problem: Problem) -> Tensor:
            if with_gradient:
                return rlsd_backward(log_probs(problem), problem)
            with torch.no_grad():
                return log_probs(problem)

        return run

    return prepare


def liger_scaled(device: torch.device) -> Callable[[Problem], Tensor]:
    _require("liger-kernel", device, on_cpu=True)
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    return lambda p: -Function.apply(p.hidden, p.weight, p.targets)


def verl_kernel(device: torch.device) -> Callable[[Problem], Tensor]:
    _require("verl", device)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda p: linear_cross_entropy(p.hidden, p.weight, p.targets, 1.0, "none", None)[0]


def cut_cross_entropy(device: torch.device) -> Callable[[Problem], Tensor]:
    _require("cut-cross-entropy", device)
    from cut_cross_entropy import linear_cross_entropy

    return lambda p: -linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none")


def trl_chunked(device: torch.device) -> Callable[[Problem], Tensor]:
    _require("trl", device, on_cpu=True)
    from trl.kernels import ChunkedLogProbFunction

    columns = 8192
    return lambda p: ChunkedLogProbFunction.apply(
        p.hidden, p.weight, None, p.targets, 1.0, columns, None, 1.0, ()
    )[0]


def liger_grpo(device: torch.device, dtype: torch.dtype) -> Run:
    _require("liger-kernel", device, on_cpu=True)
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_high=0.28)

    def run(problem: Problem) -> Tensor:
        # One advantage a response, as the interface has it; rows beyond whole ones are left out.
        N = len(problem.targets) // RESPONSE_TOKENS * RESPONSE_TOKENS
        shape = (-1, RESPONSE_TOKENS)
        loss, _ = module(
            problem.hidden[:N].view(*shape, problem.hidden.shape[1]),
            problem.weight,
            problem.targets[:N].view(shape),
            torch.ones(N, device=device).view(shape),
            problem.tokens.advantages[:N].view(shape)[:, 0],
            old_per_token_logps=problem.tokens.old_log_probs[:N].view(shape),
        )
        loss.backward()
        return loss.detach()

    return run


def quack(device: torch.device, dtype: torch.dtype) -> Run:
    _require("quack-kernels", device)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run(problem: Problem) -> Tensor:
        loss = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets)
        loss.backward()
        return loss.detach()

    return run


RLSD, GRPO, CE = "RLSD loss", "GRPO loss", "mean cross entropy"
OURS = [
    Contender(
        f"ours ({backend}){suffix}",
        "loss",
        RLSD,
        ours_loss(backend, into_main_grad, **options),
        into_main_grad,
    )
    for backend in ("triton", "torch")
    for suffix, options, into_main_grad in (
        ("", {}, False),
        (", into main_grad", {}, True),
        (", A = 0 left out", {"with_inactive": False}, False),
        (", ratio of responses", {"config": SEQUENCE_CONFIG}, False),
    )
]
PLAIN = [
    Contender("torch, full logits", "loss", RLSD, full_logits),
    Contender("torch.compile, chunks", "loss", RLSD, compiled_chunks),
    Contender("torch linear_cross_entropy", "loss", CE, torch_linear_cross_entropy),
]
PEERS = [
    Contender("Liger scaled cross entropy", "loss", RLSD, _log_prob_runs(liger_scaled, True)),
    Contender("Liger fused linear GRPO", "loss", GRPO, liger_grpo),
    Contender("verl linear_cross_entropy", "loss", RLSD, _log_prob_runs(verl_kernel, True)),
    Contender("cut-cross-entropy", "loss", RLSD, _log_prob_runs(cut_cross_entropy, True)),
    Contender("TRL chunked log-prob", "loss", RLSD, _log_prob_runs(trl_chunked, True)),
    Contender("QuACK linear cross entropy", "loss", CE, quack),
]
LP = "log_probs"
LOG_PROBS = [
    *(Contender(f"ours ({b})", LP, LP, ours_log_probs(b)) for b in ("triton", "torch")),
    Contender("torch, full logits", LP, LP, full_logits_log_probs),
    Contender("torch.compile, chunks", LP, LP, compiled_chunks_log_probs),
    Contender("Liger scaled cross entropy", LP, LP, _log_prob_runs(liger_scaled, False)),
    Contender("verl linear_cross_entropy", LP, LP, _log_prob_runs(verl_kernel, False)),
    Contender("cut-cross-entropy", LP, LP, _log_prob_runs(cut_cross_entropy, False)),
    Contender("TRL chunked log-prob", LP, LP, _log_prob_runs(trl_chunked, False)),
]
CONTENDERS = [*OURS, *PLAIN, *PEERS, *LOG_PROBS]
