"""Show what a run's model wrote, its tokens coloured by evidence weight, in the terminal.

    rlsd inspect RUN [--step N] [--count N] [--min-gain X] [--reward X]

Orange: the token gets more of the response's advantage; blue: less. Where the update scored nothing
(all responses to the question had the same reward) there is no colour. Dim italics: an
environment's answers, which the model did not write.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from megatron_rlsd.observability.samples import read_samples, sample_files
from megatron_rlsd.runtime.errors import UserError, tell
from megatron_rlsd.runtime.terminal_text import visible

MORE, LESS, GROUND = (217, 95, 2), (31, 105, 190), (20, 23, 27)
DEFAULT_CLIP = 0.2


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, help="default: the last one")
    parser.add_argument("--count", type=int, default=8, help="responses shown at most")
    parser.add_argument("--min-gain", type=float, default=0.0, help="only with such a |gain|")
    parser.add_argument("--reward", type=float, help="only with this reward")
    options = parser.parse_args(arguments)
    console = console or Console()
    try:
        path = _file_of(options.run, options.step)
        rows = read_samples(path)
    except UserError as error:
        return tell(error)
    chosen = [
        row
        for row in rows
        if largest_gain(row) >= options.min_gain
        and (options.reward is None or row["reward"] == options.reward)
    ]
    clip = _evidence_clip(options.run)
    for row in chosen[: options.count]:
        console.print(heading(row), highlight=False, soft_wrap=True)
        console.print(coloured(row, clip), "", highlight=False, soft_wrap=True)
    shown = min(len(chosen), options.count)
    console.print(
        f"{path.name}: {shown} of {len(rows)} responses ({len(chosen)} match)", highlight=False
    )
    return 0


def heading(row: dict[str, Any]) -> Text:
    """Reward, advantage, length and largest gain of a response, above its question."""
    parts = [f"reward {_number(row['reward'])}", f"advantage {_number(row['advantage'])}"]
    parts += [f"{row['tokens']} tokens", row["finish_reason"], visible(row["problem_id"])]
    if "gain" in row.get("token_columns", {}):
        parts.append(f"largest |gain| {_number(largest_gain(row))}")
    text = Text("  ".join(parts), style="bold")
    leaks = row.get("leakage", {})
    if leaks.get("phrases") or leaks.get("answer_first"):
        text.append("  speaks of a solution", style="bold red")
    asked = visible(f"\n{row['question'].strip()}  [answer {row['answer']}]\n")
    text.append(asked, style="not bold dim")
    return text


def coloured(row: dict[str, Any], clip: float) -> Text:
    """The response; a token's background is full at the bounds 1 +- ``clip`` of its weight."""
    columns = row.get("token_columns", {})
    text = Text()
    weights = columns.get("evidence_weight", [None] * len(columns.get("text", ())))
    own = columns.get("own", [1] * len(weights))
    for piece, weight, wrote in zip(columns.get("text", ()), weights, own, strict=True):
        piece = visible(piece)
        if not wrote:
            text.append(piece, style="dim italic")
            continue
        shade = 0.0 if weight is None else max(-1.0, min(1.0, (weight - 1) / (clip or 1.0)))
        text.append(piece or "∅", style=_style(shade))
    return text if columns else Text(visible(row["response"]))


def largest_gain(row: dict[str, Any]) -> float:
    gains = row.get("token_columns", {}).get("gain", ())
    return max((abs(gain) for gain in gains if gain is not None), default=0.0)


def _style(shade: float) -> Style:
    if abs(shade) < 0.01:
        return Style()
    full = MORE if shade > 0 else LESS
    mixed = (round(g + (f - g) * abs(shade)) for f, g in zip(full, GROUND, strict=True))
    return Style(color="white", bgcolor=Color.from_rgb(*mixed))


def _file_of(run: Path, step: int | None) -> Path:
    files = sample_files(run / "samples")
    if not files:
        raise UserError(f"{run}/samples holds no samples (observability.samples_per_step)")
    if step is None:
        step = max(files)
    if step not in files:
        raise UserError(f"{run}/samples has no step {step}, only {min(files)} to {max(files)}")
    return files[step]


def _evidence_clip(run: Path) -> float:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return settings.get("algorithm", {}).get("evidence_clip", DEFAULT_CLIP)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
