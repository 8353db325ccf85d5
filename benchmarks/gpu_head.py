"""Stage (a) of gpu_day: the fused head on a GPU, whole and in pieces, beside the bare products.

    python benchmarks/gpu_head.py --out OUT/head.json [--shape 16384x4096x151936] [--toy]

``whole`` times token_log_probs and the policy loss with both gradients beside one and three bare
library products, in turns. ``pieces`` times each part of one chunk: the product kernel with every
candidate tile, the same from library products, the pass over E and the two gradient products. The
file is written after every measurement, so that a run cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_profile import kernels
from head_contenders import Problem, make_problem, ours_log_probs, ours_loss
from head_measure import exact_gradients, exact_log_probs, relative_error, run_measuring_memory
from results_file import ResultsFile, machine

SHAPE = "16384x4096x151936"
TOY = "64x32x300"
FLOOR_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default=SHAPE, help="NxDxV")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=100.0, help="no new part begins after it")
    parser.add_argument("--parts", nargs="+", default=["whole", "pieces"])
    parser.add_argument("--toy", action="store_true", help="CPU, torch backend, toy sizes")
    args = parser.parse_args()
    device = torch.device("cpu" if args.toy else "cuda")
    dtype = torch.float32 if args.toy else torch.bfloat16
    N, D, V = map(int, (TOY if args.toy else args.shape).split("x"))
    deadline = time.monotonic() + args.seconds
    results = ResultsFile(args.out, {"machine": machine(device), "shape": [N, D, V]})
    if not args.toy:
        results.add("ceilings", ceilings(device))
    if "whole" in args.parts:
        whole(N, D, V, dtype, device, args.rounds, results)
    if "pieces" in args.parts and not args.toy:
        pieces(min(N, FLOOR_ROWS), D, V, dtype, device, deadline, results)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this card reaches: a large product (TFLOP/s), a large copy (GB/s, read and written)."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    source, target = (torch.empty(2**31, dtype=torch.uint8, device=device) for _ in range(2))
    product = median_seconds(lambda: a @ b, device, 10)
    copy = median_seconds(lambda: target.copy_(source), device, 10)
    return {"bf16_product_tflops": 2 * 8192**3 / product / 1e12, "copy_gbs": 2 * 2**31 / copy / 1e9}


def whole(
    N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, rounds: int, out: ResultsFile
) -> None:
    """Calls as users make them; errors against float64 of the first rows, and extra memory."""
    backend = "torch" if device.type == "cpu" else "triton"
    problem = make_problem(N, D, V, 1.0, dtype, device, seed=0)
    runs: dict[str, Callable[[Problem], Any]] = {
        "floor_1": lambda p: bare_products(p, 1),
        "floor_3": lambda p: bare_products(p, 3),
        "token_log_probs": ours_log_probs(backend)(device, dtype),
        "loss_into_main_grad": ours_loss(backend, True)(device, dtype),
        "loss": ours_loss(backend, False)(device, dtype),
    }
    for name in ("token_log_probs", "loss_into_main_grad", "loss"):
        started = time.perf_counter()
        problem.main_grad.zero_()
        runs[name](problem)  # compiles and tunes
        synchronize(device)
        first = time.perf_counter() - started
        problem.main_grad.zero_()
        result, extra = run_measuring_memory(runs[name], problem)
        found: dict[str, Any] = {"first_call_seconds": first, "extra_gib": extra / 2**30}
        if name == "token_log_probs":
            exact = exact_log_probs(problem, 64)
            found["largest_error"] = float((result[:64] - exact).abs().max())
        out.add(f"whole/{name}", found)
    few = make_problem(min(N, 256), D, V, 1.0, dtype, device, seed=1)
    runs["loss"](few)
    assert few.hidden.grad is not None
    assert few.weight.grad is not None
    d_hidden, d_weight = exact_gradients(few)
    errors = [relative_error(few.hidden.grad, d_hidden), relative_error(few.weight.grad, d_weight)]
    out.add("whole/errors_of_256_rows", dict(zip(("d_hidden", "d_weight"), errors, strict=True)))
    del few, d_hidden, d_weight

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            problem.clear()
            times[name].append(seconds(lambda: run(problem), device))  # noqa: B023
    if device.type == "cuda":
        for name in ("token_log_probs", "loss_into_main_grad"):
            out.add(f"kernels/{name}", kernels(lambda: runs[name](problem)))  # noqa: B023
    medians = {name: statistics.median(each) for name, each in times.items()}
    out.add(
        "whole/milliseconds",
        {name: [1e3 * min(t), 1e3 * medians[name], 1e3 * max(t)] for name, t in times.items()},
    )
    out.add(
        "whole/over_floor",
        {
            "token_log_probs": medians["token_log_probs"] / medians["floor_1"],
            "loss_into_main_grad": medians["loss_into_main_grad"] / medians["floor_3"],
            "loss": medians["loss"] / medians["floor_3"],
        },
    )


def bare_products(problem: Problem, count: int) -> None:
    """The products alone, in chunks of rows whose logits fit, results in the inputs' dtype."""
    with torch.no_grad():
        for hidden in problem.hidden.split(FLOOR_ROWS):
            logits = hidden @ problem.weight.T
            if count == 3:
                logits @ problem.weight
                logits.T @ hidden


def pieces(
    C: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    device: torch.device,
    deadline: float,
    out: ResultsFile,
) -> None:
    """Milliseconds of each part of one chunk of C rows."""
    import triton
    from triton_tiles import TILES, tile_kernel

    from megatron_rlsd.ops import triton_launch
    from megatron_rlsd.ops.collectives import merge_log_softmax

    problem = make_problem(C, D, V, 1.0, dtype, device, seed=2)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    targets = problem.targets.to(torch.int32)
    exp = triton_launch.new_exp_buffer(C, V, hidden)
    call = {"scale": 1.0, "softcap": None}

    def record(name: str, run: Callable[[], Any], rounds: int = 8) -> None:
        if time.monotonic() > deadline:
            out.add(f"pieces/{name}", "no time left")
            return
        try:
            run()
            out.add(f"pieces/{name}", round(1e3 * median_seconds(run, device, rounds), 3))
        except Exception as error:
            out.add(f"pieces/{name}", f"{type(error).__name__}: {str(error)[:200]}")

    record("cublas logits bf16", lambda: hidden @ weight.T)
    logits = (hidden @ weight.T)[:, :V]
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros(V, D, device=device)
    record("cublas d_hidden bf16", lambda: torch.mm(logits, weight, out=d_hidden))
    record("cublas d_hidden float32", lambda: torch.mm(logits, weight, out_dtype=torch.float32))
    record("cublas d_weight bf16", lambda: logits.T @ hidden)
    record(
        "cublas d_weight added in float32",
        lambda: torch.addmm(
            d_weight, logits.T, hidden, out_dtype=torch.float32, beta=1, out=d_weight
        ),
    )
    record(
        "cublas d_weight float32",
        lambda: torch.mm(logits.T, hidden, out_dtype=torch.float32, out=d_weight),
    )
    for keeps, kept in ((True, exp), (False, None)):
        what = "E kept" if keeps else "sums only"
        for entropy in (False, True):
            with_entropy = ", entropy" if entropy else ""
            for tile in TILES:
                if entropy and not tile.default:
                    continue
                run = tile_kernel(tile, hidden, weight, targets, kept, with_entropy=entropy)
                record(f"product {what}{with_entropy}: {tile}", run)
    partials = triton_launch.launch_product(
        hidden, weight, targets, with_entropy=False, exp_CV=exp, **call
    )
    softmax = merge_log_softmax(triton_launch.launch_merge(partials)[None])
    record("merge of sums", lambda: triton_launch.launch_merge(partials))
    ones = torch.ones(C, device=device)

    def gradient() -> None:
        triton_launch.launch_exp_to_gradient(
            exp,
            partials,
            targets,
            log_probs_C=softmax.log_probs,
            max_logits_C=softmax.max_logit,
            log_sums_C=softmax.log_sum,
            d_log_probs_C=ones,
            d_entropies_C=None,
            entropies_C=None,
            gain_1=None,
            **call,
        )

    record("E to gradient", gradient)
    out.add("pieces/versions", {"triton": triton.__version__, "rows": C})


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Device time of one call between two events; on a CPU its wall time."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def median_seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    for _ in range(2):
        run()
    return statistics.median(seconds(run, device) for _ in range(rounds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
