"""Tables and plots of benchmarks/fused_head.py's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FLOOR_OF = {"log_probs": "1 bare product", "loss": "3 bare products"}


def markdown(results: dict[str, Any]) -> str:
    """The machine, a table for every shape, and what did not run."""
    lines = ["# Fused head", "", ", ".join(f"{k}: {v}" for k, v in results["machine"].items()), ""]
    for case, rows in by_case(results["rows"]).items():
        N, D, V, shard, active = case
        title = f"N {N}, D {D}, V {V}"
        title += f" (shard of {shard})" if shard > 1 else ""
        title += f", {active:.0%} of the rows with an advantage" if active < 1 else ""
        lines += [f"## {title}", ""]
        for task in ("loss", "log_probs"):
            of_task = [row for row in rows if row["task"] == task]
            if of_task:
                lines += _table(task, of_task, floor_seconds(rows))
    if results["skipped"]:
        lines += ["## Not run", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def by_case(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("N", "D", "V", "shard", "active"))
        cases.setdefault(key, []).append(row)
    return cases


def floor_seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {r["contender"]: r["seconds"]["median"] for r in rows if r["task"] == "floor"}


def _table(task: str, rows: list[dict[str, Any]], floor: dict[str, float]) -> list[str]:
    base = FLOOR_OF[task]
    measured = [row for row in rows if "seconds" in row]
    eager = next((r for r in measured if r["contender"] == "torch, full logits"), None)
    what = "loss with both gradients" if task == "loss" else "log-probabilities"
    floors = ", ".join(f"{name} {1e3 * s:.4g} ms" for name, s in floor.items())
    lines = [
        f"{what} (floors: {floors})",
        "",
        f"| contender | computes | ms (median) | / {base} | / full logits | extra MiB "
        "| / full logits | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['contender']} | {row['computes']} | {row.get('failed')} |||||")
            continue
        seconds = row["seconds"]["median"]
        cells = [row["contender"], row["computes"].replace("_", "-"), f"{1e3 * seconds:.4g}"]
        cells += [f"{seconds / floor[base]:.2f}"]
        cells += [f"{seconds / eager['seconds']['median']:.2f}" if eager else ""]
        cells += [f"{row['extra_bytes'] / 2**20:.0f}"]
        cells += [f"{row['extra_bytes'] / eager['extra_bytes']:.3f}" if eager else ""]
        cells += [", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(results: dict[str, Any], path: Path) -> str:
    """Time and memory of the loss against N, for the first D and V with several N."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        return f"no plot: {error}"
    rows = [r for r in results["rows"] if r["shard"] == 1 and r["active"] == 1]
    rows = [r for r in rows if r["task"] == "loss" and "seconds" in r]
    sizes = {(r["D"], r["V"]) for r in rows}
    several = [s for s in sorted(sizes) if len({r["N"] for r in rows if _size(r) == s}) > 1]
    if not several:
        return "no plot: it needs several N"
    D, V = several[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for name in dict.fromkeys(r["contender"] for r in rows):
        of_name = sorted(
            (r["N"], r["seconds"]["median"], r["extra_bytes"] / 2**20)
            for r in rows
            if r["contender"] == name and _size(r) == (D, V)
        )
        if of_name:
            N, seconds, extra = zip(*of_name, strict=True)
            left.plot(N, seconds, marker="o", label=name)
            right.plot(N, extra, marker="o", label=name)
    for axes, label in ((left, "seconds"), (right, "extra memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
        axes.grid(True, which="both", alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"loss with both gradients, D {D}, V {V}, {results['machine']['dtype']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return f"plot: {path}"


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["D"], row["V"]
