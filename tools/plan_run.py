"""Will this run fit, how long will a step take, and which layout is best?

    tools/plan_run.py CONFIG.yaml --gpus 64 [--memory 80] [--search] [key=value ...]

Needs the model's config.json and no weights; nothing is built and no GPU is used. Exit code 0: it
fits. 1: it does not, with the reason and what would help. 2: the configuration is wrong.
"""

from __future__ import annotations

import argparse
import sys

from megatron_rlsd.config import Config, config_parser, load_config
from megatron_rlsd.hf_bridge import ModelDims, family_for, load_hf_config
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.planning.memory import GIB
from megatron_rlsd.planning.plan import Machine, Plan, make_plan, remedies
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.report import layout_line, plan_text, remedy_lines
from megatron_rlsd.planning.search import overrides, search
from megatron_rlsd.planning.work import Lengths
from megatron_rlsd.runtime.errors import UserError, tell


def arguments() -> argparse.ArgumentParser:
    parser = config_parser(__doc__)
    parser.add_argument("--gpus", type=int, help="of the trainer; default: one model replica")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of one GPU")
    parser.add_argument("--reserve", type=float, default=6.0, help="GiB of it not to count on")
    parser.add_argument("--host-memory", type=float, help="GiB of one machine; default: any")
    parser.add_argument("--servers", type=int, help="in place of rollout.sglang.num_servers")
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


def main(argv: list[str]) -> int:
    args = arguments().parse_intermixed_args(argv)
    try:
        served = []
        if args.servers:
            served = [f"rollout.sglang.num_servers={args.servers}", "rollout.sglang.urls=[]"]
        config = load_config(args.config, [*args.overrides, *served])
        try:
            hf_config = load_hf_config(config.model.hf_path)
        except UserError as error:
            raise UserError(
                f"{error}; a plan reads the config.json in it, and no weights"
            ) from None
        model = family_for(hf_config).dims(hf_config)
        rates = Rates().with_given(args.rate)
    except UserError as error:
        return tell(error)
    parallel, precision = config.parallel, config.model.precision
    if precision.fp8 != "none" and args.kernels == "cuda":
        return tell(
            UserError(f"model.precision.fp8={precision.fp8} needs --kernels transformer_engine")
        )
    machine = Machine(
        gpus=args.gpus or parallel.tensor * parallel.pipeline * parallel.context,
        gpus_per_node=args.gpus_per_node,
        memory_gib=args.memory,
        reserve_gib=args.reserve,
        host_gib=args.host_memory,
        kernels=args.kernels or ("cuda" if precision.fp8 == "none" else "transformer_engine"),
        rates=rates,
    )
    lengths = assumed_lengths(args, config)
    if args.search:
        return print_search(config, model, machine, lengths, args.best)
    try:
        plan = make_plan(config, model, machine, lengths)
    except LayoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan_text(plan, model, lengths))
    if not plan.problems:
        return 0
    helpful = remedies(plan, model, lengths)
    print("\n".join(remedy_lines(helpful)))
    if not helpful:
        found = search(config, model, machine, lengths)
        if found.plans:
            print_plans(found.plans[:1], config, machine)
        else:
            print(refusal(found.smallest, machine))
    return 1


def assumed_lengths(args: argparse.Namespace, config: Config) -> Lengths:
    default = Lengths.default(config)
    return Lengths(
        prompt=args.prompt_tokens or default.prompt,
        hint=default.hint if args.hint_tokens is None else args.hint_tokens,
        response=args.response_tokens or default.response,
        spread=args.response_spread,
    )


def print_search(
    config: Config, model: ModelDims, machine: Machine, lengths: Lengths, best: int
) -> int:
    found = search(config, model, machine, lengths)
    print(f"{found.tried} layouts are possible on {machine.gpus} GPUs, {len(found.plans)} fit")
    if not found.plans:
        print(refusal(found.smallest, machine))
        return 1
    print_plans(found.plans[:best], config, machine)
    print()
    print(plan_text(found.plans[0], model, lengths))
    return 0


def print_plans(plans: list[Plan], config: Config, machine: Machine) -> None:
    """Each with the overrides that make it of ``config``."""
    for number, plan in enumerate(plans, 1):
        print(
            f"{number}. {layout_line(plan.config, machine.gpus)}: score {plan.time.score:.1f} s, "
            f"update {plan.time.update:.1f} s, MFU {100 * plan.time.mfu:.1f} %, "
            f"peak {plan.fullest.peak / GIB:.1f} GiB"
        )
        print(f"   {' '.join(overrides(plan, config)) or '(the configuration as it is)'}")


def refusal(smallest: Plan | None, machine: Machine) -> str:
    if smallest is None:
        return f"no layout divides this model over {machine.gpus} GPUs"
    return (
        f"NO LAYOUT FITS; the smallest is {layout_line(smallest.config, machine.gpus)}: "
        f"{'; '.join(smallest.problems)}. Take more GPUs, a smaller "
        f"train.max_tokens_per_microbatch or shorter responses"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
