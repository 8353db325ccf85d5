"""Can this configuration run on these processes? Asked before servers start, in seconds.

    python -m megatron_rlsd.diagnosis.preflight CONFIG.yaml --tasks 32 [key=value ...]

Reads the configuration and the model's config.json, and asks the servers' Python what it loads; no
weights, no GPU, no Megatron. Exit code 0:
nothing speaks against it. 2: something does, and each is named. 3: so it is on ``--tasks``
processes, but on ``--wanted-tasks`` of them it could run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from megatron_rlsd.config import Config, config_parser, load_config
from megatron_rlsd.diagnosis.agreement import agreement_problems
from megatron_rlsd.hf_bridge import ModelDims, family_for, load_hf_config
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.layout import LayoutError, check_layout
from megatron_rlsd.runtime.errors import EXIT_USER_ERROR, UserError, tell
from megatron_rlsd.runtime.terminal_text import visible

EXIT_TOO_FEW = 3


def arguments() -> argparse.ArgumentParser:
    parser = config_parser(__doc__)
    parser.add_argument("--tasks", type=int, required=True, help="processes of the trainer")
    parser.add_argument("--wanted-tasks", type=int, help="another number, should these be too few")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="0: not checked")
    return parser


def main(argv: list[str]) -> int:
    args = arguments().parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        hf_config = load_hf_config(config.model.hf_path)
        model = family_for(hf_config).dims(hf_config)
    except UserError as error:
        return tell(error)
    problems = [*server_problems(config, model, args.gpus_per_node)]
    problems += agreement_problems(config, args.gpus_per_node)
    layout = layout_problem(config, model, args.tasks)
    for problem in [*layout, *problems]:
        print(f"error: {visible(str(problem))}", file=sys.stderr)
    if not layout and not problems:
        return 0
    more_would_do = args.wanted_tasks and not layout_problem(config, model, args.wanted_tasks)
    return EXIT_TOO_FEW if more_would_do and not problems else EXIT_USER_ERROR


def layout_problem(config: Config, model: ModelDims, tasks: int) -> list[str]:
    """What speaks against the layout, if anything does."""
    try:
        check_layout(config.parallel, tasks, model)
        check_eight_bit(model, config.parallel, config.model.precision)
    except LayoutError as error:
        return [str(error)]
    return []


def server_problems(config: Config, model: ModelDims, gpus_per_node: int) -> Iterator[str]:
    """Why a node cannot hold rollout.sglang's servers, or they cannot split the model."""
    settings = config.rollout.sglang
    if config.rollout.engine != "sglang":
        yield f"rollout.engine={config.rollout.engine}: only sglang has servers on nodes"
        return
    if settings.urls:
        yield f"rollout.sglang.urls={settings.urls}: this job starts its own servers"
    size = settings.tensor_parallel
    needed = settings.first_gpu + settings.num_servers * size
    if settings.device != "cpu" and 0 < gpus_per_node < needed:
        yield (
            f"rollout.sglang.first_gpu={settings.first_gpu} + num_servers={settings.num_servers} x "
            f"tensor_parallel={size} = {needed} GPUs, but a node has {gpus_per_node}"
        )
    yield from _split_problems(model, size)


def _split_problems(model: ModelDims, size: int) -> Iterator[str]:
    heads = {"attention heads": model.num_attention_heads}
    # The engine copies KV heads where it has more ranks than there are of them.
    if model.latent is None and size % model.num_query_groups:
        heads["KV heads"] = model.num_query_groups
    for name, count in heads.items():
        if count % size:
            yield (
                f"rollout.sglang.tensor_parallel={size} does not divide the model's {count} {name}"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
