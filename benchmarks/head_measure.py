"""Time, memory, floors and errors for benchmarks/fused_head.py.

Time: wall clock around a call and a device synchronisation; contenders take turns, so that a slow
minute of the machine hits them all; the inputs rotate, so that none is in a cache. Memory on CUDA:
the allocator's peak. On CPU: this process's peak resident size, as the kernel counts it, after the
C library has given back what it kept.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from head_contenders import CONFIG, Problem, Run
from torch import Tensor

from megatron_rlsd.ops.reference import reference_log_probs, reference_policy_loss
from megatron_rlsd.ops.torch_products import add_product, product

FLOOR_BLOCK = 1024
FLOOR_ROWS = {"cpu": 256, "cuda": 4096}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    runs: dict[str, Run], problems: list[Problem], rounds: int, limit_seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, all run before: ``rounds`` times, or at least twice until the limit."""
    device = problems[0].hidden.device
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for number in range(rounds):
        for name, run in runs.items():
            problem = problems[number % len(problems)]
            problem.clear()
            times[name].append(seconds_of(lambda: run(problem), device))  # noqa: B023
            problem.clear()
        if number and time.perf_counter() - started > limit_seconds:
            break
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "runs": len(times)}


def run_measuring_memory(run: Run, problem: Problem) -> tuple[Tensor, int]:
    """The result, and the peak over what was there before, gradients included; warmed up before.

    On CPU this needs Linux and glibc.
    """
    problem.clear()
    gc.collect()
    if problem.hidden.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run(problem)
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is this call's peak
    result = run(problem)
    return result, _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def floors(problem: Problem) -> dict[str, Run]:
    """Bare products of the same shapes, in chunks of rows whose logits fit.

    On CPU the fastest of the libraries that torch has, block by block; on CUDA cuBLAS, in the
    inputs' dtype. One product is what log-probabilities need, three what the loss and both
    gradients need, four what recomputing costs.
    """
    device = problem.hidden.device
    rows = FLOOR_ROWS[device.type]
    bare = _bare_on_cpu if device.type == "cpu" else _bare_on_cuda
    return {
        f"{count} bare product{'s' * (count > 1)}": _floor(bare, rows, count) for count in (1, 3, 4)
    }


def _floor(bare: Callable[[Tensor, Tensor, int], None], rows: int, count: int) -> Run:
    def run(problem: Problem) -> Tensor:
        with torch.no_grad():
            for hidden in problem.hidden.split(rows):
                bare(hidden, problem.weight, count)
        return hidden

    return run


def _bare_on_cpu(hidden: Tensor, weight: Tensor, count: int) -> None:
    hidden = hidden.float()
    d_hidden = torch.zeros_like(hidden)
    for block in weight.split(FLOOR_BLOCK):
        block = block.float()
        logits = product(hidden, block.T)
        if count >= 3:
            add_product(d_hidden, logits, block)
            product(logits.T, hidden)
        if count == 4:
            product(hidden, block.T)


def _bare_on_cuda(hidden: Tensor, weight: Tensor, count: int) -> None:
    logits = hidden @ weight.T
    if count >= 3:
        logits @ weight
        logits.T @ hidden
    if count == 4:
        torch.mm(hidden, weight.T, out=logits)


def exact_log_probs(problem: Problem, rows: int = 256) -> Tensor:
    """float64 from the same inputs, of the first rows."""
    with torch.no_grad():
        return reference_log_probs(problem.hidden[:rows], problem.weight, problem.targets[:rows])[0]


def exact_gradients(problem: Problem, rows: int = 128) -> tuple[Tensor, Tensor]:
    """d_hidden and d_weight in float64, by autograd through full logits of a few rows at a time."""
    weight = problem.weight.detach().double().requires_grad_()
    parts = []
    for start in range(0, len(problem.targets), rows):
        part = slice(start, start + rows)
        hidden = problem.hidden[part].detach().double().requires_grad_()
        tokens = problem.tokens.select(part)
        loss = reference_policy_loss(
            hidden, weight, problem.targets[part], tokens=tokens, config=CONFIG
        )
        loss.backward()
        assert hidden.grad is not None
        parts.append(hidden.grad)
    assert weight.grad is not None
    return torch.cat(parts), weight.grad


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())
