"""``rlsd evaluate``: megatron_rlsd/evaluate.py, on as many ranks as asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_rlsd.commands.launching import count, processes, start_ranks
from megatron_rlsd.evaluate import evaluate, parser

TEARDOWN_SECONDS = 30.0
"""That ranks get to end once one of them has failed."""


def main(argv: list[str] | None = None) -> int:
    made = parser()
    made.add_argument("--nproc", type=processes, metavar="N", help="embedded engines: N, or gpu")
    arguments = made.parse_intermixed_args(argv)
    if "RANK" in os.environ or (ranks := count(arguments.nproc)) == 1:
        return evaluate(arguments)
    words = ["evaluate", *(sys.argv[2:] if argv is None else argv)]
    return start_ranks(words, ranks, TEARDOWN_SECONDS, arguments.out or Path())
