"""Will this run fit, how long will a step take, and which layout is best?

    rlsd plan CONFIG.yaml --gpus 64 [--memory 80] [--search] [key=value ...]

Needs the model's config.json and no weights; nothing is built and no GPU is used. Exit code 0: it
fits. 1: it does not, with the reason and what would help. 2: the configuration is wrong.
"""

from __future__ import annotations

import argparse

from megatron_rlsd.config import config_parser


def arguments() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, "rlsd plan")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="of the trainer; default: one model replica"
    )
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", default=8)
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of one GPU")
    parser.add_argument("--reserve", type=float, default=6.0, help="GiB of it not to count on")
    parser.add_argument("--host-memory", type=float, help="GiB of one machine; default: any")
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument("--servers", type=positive, metavar="N", help="of all machines together")
    servers.add_argument(
        "--server-nodes",
        type=positive,
        metavar="N",
        help="machines that start rollout.sglang.num_servers each; default: the trainer's own "
        "where it has GPUs left, else one for every two of the trainer's",
    )
    parser.add_argument(
        "--kernels",
        choices=("cuda", "transformer_engine"),
        help="default: transformer_engine with model.precision.fp8, else cuda",
    )
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--prompt-tokens", type=float)
    parser.add_argument("--hint-tokens", type=float)
    parser.add_argument("--response-tokens", type=float, help="mean before the limit cuts it")
    parser.add_argument("--response-spread", type=float, default=0.6)
    parser.add_argument("--search", action="store_true", help="go over all layouts")
    parser.add_argument("--best", type=int, default=5, help="layouts that --search prints")
    return parser


def positive(text: str) -> int:
    """A count of the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_intermixed_args(argv)
    # Slow to import: --help does without.
    from megatron_rlsd.commands.plan_answer import plan

    return plan(args)
