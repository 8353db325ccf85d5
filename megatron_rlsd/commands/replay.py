"""Run one recorded update again, without any rollout, and compare it with what the run got.

    rlsd replay RUN STEP [--checkpoint DIR] [key=value ...]
    torchrun --nproc-per-node 2 -m megatron_rlsd replay RUN STEP parallel.tensor=2

RUN is a run's folder. Bad steps are always recorded; others as train.record_steps says. Settings
given as key=value replace those of the run: the layout may be another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rlsd.config import load_config
from megatron_rlsd.runtime.errors import UserError, tell

COMPARED = ("train/loss", "train/grad_norm")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    # Slow to import: --help does without.
    from megatron_rlsd.recovery.replay import replay

    try:
        config = load_config(
            arguments.run / "config.yaml",
            [*arguments.overrides, f"run_dir={arguments.run}"],
            needs_secrets=False,
        )
        replayed = replay(config, arguments.step, arguments.checkpoint)
    except UserError as error:
        return tell(error)
    if replayed.rank == 0:
        for name in COMPARED:
            now, then = replayed.metrics[name], replayed.recorded.metrics[name]
            if then is None:
                print(f"step {arguments.step}: {name} {now} (recorded: no finite number)")
            else:
                difference = abs(now - then) / max(abs(then), 1e-30)
                print(
                    f"step {arguments.step}: {name} {now:.9g} (recorded {then:.9g}, relative "
                    f"difference {difference:.1e})"
                )
    return 0
