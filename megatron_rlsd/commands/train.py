"""Train with RLSD, or with one of its relatives.

    rlsd train CONFIG.yaml [--nproc N] [key=value ...]

Settings given as key=value replace those of CONFIG.yaml. --nproc starts N processes on this
machine; under torchrun or srun the ranks are started already, each runs this command without it.
Exit code 0: finished. 2: something is not as a run needs it, told in one message. 69: a rank was
lost, 75: stopped by a signal with everything saved; in both cases the same command goes on. 1: a
fault of this program, with its traceback.
"""

from __future__ import annotations

from megatron_rlsd.commands.launching import start


def main(argv: list[str] | None = None) -> int:
    return start("train", argv, __doc__)
