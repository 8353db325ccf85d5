"""Train every layout of the test matrix against one process; write the table docs/layouts.md.

python -m benchmarks.layout_matrix
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.distributed.layout_matrix import LAYOUTS, REFERENCES
from tests.distributed.layouts import STEPS, Measured, differences, measure, save_models

MODELS = {
    "dense": "dense, tied embeddings (Qwen3)",
    "untied": "dense, untied embeddings (Llama)",
    "experts": "mixture of experts (Qwen3-MoE)",
}
BEGIN, END = "<!-- layout matrix: begin -->\n", "<!-- layout matrix: end -->\n"


def main(out: Path) -> None:
    rows: dict[str, list[str]] = {name: [] for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(Path(folder))
        expected = measure(REFERENCES, models, Path(folder))
        for group in LAYOUTS:
            for layout, measured in measure(LAYOUTS[group], models, Path(folder)).items():
                found = differences(measured, expected[layout.reference])
                numbers = " | ".join(f"{found[k]:.1e}" for k in ("loss", "grad_norm", "weights"))
                numbers += f" | {state_share(measured, expected[layout.reference]):.0%}"
                rows[layout.model].append(f"| {layout.world} | {layout.name} | {numbers} |")
                print(layout.model, rows[layout.model][-1], flush=True)
    text = out.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    out.write_text(before + table(rows) + after)


def state_share(measured: Measured, expected: Measured) -> float:
    """Counted bytes of parameters, gradients and optimizer on the fullest rank, of one process."""
    fullest = max(sum(rank["counted"].values()) for rank in measured.state)
    return fullest / sum(expected.state[0]["counted"].values())


def table(rows: dict[str, list[str]]) -> str:
    lines = [
        f"Measured with Megatron-Core {version('megatron-core')} and torch {version('torch')} on "
        f"CPU over gloo, float32, {STEPS} updates; by `python -m benchmarks.layout_matrix`.",
        "",
    ]
    for model, title in MODELS.items():
        lines += [
            f"### {title[0].upper()}{title[1:]}",
            "",
            "| processes | layout | loss | grad norm | weights | state |",
            "|---|---|---|---|---|---|",
            *rows[model],
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(__file__).parent.parent / "docs/layouts.md")
