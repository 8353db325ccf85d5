"""The answer of ``rlsd plan``; its command line is in plan.py."""

from __future__ import annotations

import argparse
import sys

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.hf_bridge import ModelDims, family_for, load_hf_config
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.planning.memory import GIB
from megatron_rlsd.planning.plan import Machine, RunPlan, make_plan, remedies
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.report import layout_line, plan_text, remedy_lines
from megatron_rlsd.planning.search import overrides, search
from megatron_rlsd.planning.work import Lengths
from megatron_rlsd.runtime.errors import UserError, tell


def plan(args: argparse.Namespace) -> int:
    """Print the plan that the command line of plan.py asks for; the exit code."""
    try:
        config = load_config(args.config, args.overrides, needs_secrets=False)
        if config.rollout.engine == "embedded" and (args.servers or args.server_nodes):
            raise UserError("--servers and --server-nodes need rollout.engine=sglang")
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
        servers=args.servers,
        server_nodes=args.server_nodes,
    )
    lengths = assumed_lengths(args, config)
    if args.search:
        return print_search(config, model, machine, lengths, args.best)
    try:
        made = make_plan(config, model, machine, lengths)
    except LayoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan_text(made, model, lengths))
    if not made.problems:
        return 0
    helpful = remedies(made, model, lengths)
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


def print_plans(plans: list[RunPlan], config: Config, machine: Machine) -> None:
    """Each with the overrides that make it of ``config``."""
    for number, plan in enumerate(plans, 1):
        print(
            f"{number}. {layout_line(plan.config, machine.gpus)}: score {plan.time.score:.1f} s, "
            f"update {plan.time.update:.1f} s, MFU {100 * plan.time.mfu:.1f} %, "
            f"peak {plan.fullest.peak / GIB:.1f} GiB"
        )
        print(f"   {' '.join(overrides(plan, config)) or '(the configuration as it is)'}")


def refusal(smallest: RunPlan | None, machine: Machine) -> str:
    if smallest is None:
        return f"no layout divides this model over {machine.gpus} GPUs"
    return (
        f"NO LAYOUT FITS; the smallest is {layout_line(smallest.config, machine.gpus)}: "
        f"{'; '.join(smallest.problems)}. Take more GPUs, a smaller "
        f"train.max_tokens_per_microbatch or shorter responses"
    )
