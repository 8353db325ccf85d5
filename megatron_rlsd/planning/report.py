"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.planning.memory import GIB, RankMemory, model_parameters
from megatron_rlsd.planning.plan import Machine, RunPlan
from megatron_rlsd.planning.work import Lengths, StepTokens


def layout_line(config: Config, gpus: int) -> str:
    parallel = config.parallel
    replicas = gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    sizes = {
        "TP": parallel.tensor,
        "PP": parallel.pipeline,
        "VPP": parallel.virtual_pipeline,
        "CP": parallel.context,
        "EP": parallel.expert,
        "ETP": parallel.expert_tensor_size if parallel.expert_tensor or parallel.expert > 1 else 1,
        "DP": replicas,
    }
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "DP")]
    parts += ["SP"] * parallel.sequence
    if config.model.recompute == "selective":
        parts.append(f"recompute {'+'.join(config.model.recompute_modules)}")
    elif config.model.recompute == "full":
        parts.append("full recompute")
    parts += ["distributed optimizer"] * config.optimizer.distributed
    return " ".join(parts)


def plan_text(plan: RunPlan, model: ModelDims, lengths: Lengths) -> str:
    """Everything about one plan, the answer first, assumptions included."""
    config, machine = plan.config, plan.machine
    lines = [
        *answer_lines(plan),
        "",
        f"model      {config.model.hf_path}: {model_parameters(model, config) / 1e9:.2f} B "
        f"parameters, {config.model.dtype}{_products(config)}",
        f"layout     {layout_line(config, machine.gpus)} on {machine.gpus} GPUs",
        f"batch      {batch_line(plan.tokens)}; at most {plan.work.micro_batches} micro-batches of "
        f"{plan.work.update.tokens} tokens a rank and update "
        f"({plan.work.score.tokens} with a hint)",
        "",
        *memory_table(plan),
        "",
        *time_lines(plan),
        "",
        *assumption_lines(machine, lengths),
    ]
    return "\n".join(lines)


def answer_lines(plan: RunPlan) -> list[str]:
    """The verdict, the servers, what a step costs and what it gets done."""
    if plan.problems:
        verdict = f"DOES NOT FIT: {'; '.join(plan.problems)}"
    else:
        spare = (plan.machine.usable - plan.fullest.peak) / GIB
        verdict = f"FITS, {spare:.1f} GiB to spare on stage {plan.fullest.stage}"
    lines, trainer = [verdict], plan.machine.gpus
    servers, seconds = plan.servers, plan.time.total
    if servers is None:
        lines.append("servers    none: the trainer's processes sample")
    else:
        size = servers.tensor_parallel
        each = "" if servers.beside is None else f" of {size} GPU{'s' * (size > 1)} each"
        lines.append(f"servers    {servers.count}{each} ({servers.why})")
    if plan.gpus is None or plan.time.rollout is None:
        lines.append("cost       unknown: so are the GPUs and the time of servers that run already")
        return lines
    beside = plan.gpus - trainer
    gpus = f"{plan.gpus} GPUs" + (f" ({trainer} trainer, {beside} servers)" if beside else "")
    hours, steps = plan.gpus * seconds / 3600, plan.config.train.steps
    sampled, processed = (
        tokens / seconds / plan.gpus for tokens in (plan.tokens.responses, plan.tokens.student)
    )
    return [
        *lines,
        f"cost       {gpus}, {seconds:.1f} s a step: {hours:.3g} GPU-hours; {steps * hours:,.0f} "
        f"for train.steps={steps}, without evaluation, checkpoints and start",
        f"speed      {sampled:,.0f} sampled tokens per second per GPU "
        f"(perf/tokens_per_second_per_gpu), {processed:,.0f} with prompts",
    ]


def _products(config: Config) -> str:
    precision = config.model.precision
    if precision.fp8 == "none":
        return ""
    kept = precision.first_layers_bf16 + precision.last_layers_bf16
    return f", products in fp8 ({precision.fp8}; {kept} layers in bfloat16)"


def batch_line(tokens: StepTokens) -> str:
    return (
        f"{tokens.trajectories} trajectories of {tokens.prompt:.0f} + {tokens.response:.0f} tokens "
        f"(hint {tokens.hint:.0f}), {tokens.updates} update{'s' * (tokens.updates != 1)}"
    )


def memory_table(plan: RunPlan) -> list[str]:
    """Parts by stage: the first, the fullest and the last one."""
    last = len(plan.ranks) - 1
    stages = sorted({0, plan.fullest.stage, last})
    shown = [plan.ranks[stage] for stage in stages]
    titles = [f"stage {rank.stage}" for rank in shown]
    lines = [_row("memory of a GPU, GiB", titles)]
    for name in _names(rank.held for rank in shown):
        lines.append(_row(name, [_gib(rank.held.get(name, 0)) for rank in shown]))
    for moment in _names(rank.moments for rank in shown):
        lines.append(_row(f"at {moment}", [""] * len(shown)))
        tables = [rank.moments.get(moment, {}) for rank in shown]
        for part in _names(tables):
            lines.append(_row(f"  {part}", [_gib(table.get(part, 0)) for table in tables]))
        lines.append(_row("  in all", [_at(rank, moment) for rank in shown]))
    lines.append(_row("peak", [f"{rank.peak / GIB:.2f}" for rank in shown]))
    usable = plan.machine.usable / GIB
    lines.append(
        f"usable     {usable:.1f} GiB = {plan.machine.memory_gib:g} - "
        f"{plan.machine.reserve_gib:g} for CUDA, NCCL and the allocator"
    )
    if (server := plan.server) is not None:
        lines.append(
            f"servers    on the same GPUs: {server.static / GIB:.1f} GiB of each for weights and a "
            f"cache of {max(0, server.cached_tokens)} tokens a server, given back while training"
        )
    if plan.host_bytes:
        parts = ", ".join(_names(rank.host for rank in plan.ranks))
        lines.append(f"host       {plan.host_bytes / GIB:.1f} GiB pinned a machine ({parts})")
    return lines


def time_lines(plan: RunPlan) -> list[str]:
    time = plan.time
    rollout = "unknown (servers that run already)"
    if time.rollout is not None:
        rollout = f"{time.rollout:.1f} s{' beside training' if time.overlaps else ''}"
    return [
        f"step       {time.total:.1f} s: rollout {rollout}, score {time.score:.1f} s, "
        f"update {time.update:.1f} s, weight sync {time.weight_sync:.1f} s",
        f"update     {100 * time.mfu:.1f} % of the GPUs' peak (MFU); waiting in the pipeline "
        f"{100 * time.bubble:.0f} %, communication {100 * time.communication:.0f} %",
    ]


def assumption_lines(machine: Machine, lengths: Lengths) -> list[str]:
    rates = machine.rates
    given = ", ".join(f"{name}={value:g}" for name, value in vars(rates).items())
    return [
        "assumed, not measured:",
        f"  rates    {given}",
        f"  lengths  prompt {lengths.prompt:.0f}, hint {lengths.hint:.0f}, response log-normal of "
        f"mean {lengths.response:.0f} and spread {lengths.spread:g}, cut at the limit",
        f"  kernels  {machine.kernels}; no overlap of communication with computation; experts get "
        "equal shares",
    ]


def remedy_lines(found: list[tuple[dict[str, Any], RunPlan]]) -> list[str]:
    if not found:
        return ["no single change makes it fit; changed together:"]
    lines = ["each of these makes it fit:"]
    for changes, plan in found:
        text = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
        lines.append(
            f"  {text}   (peak {plan.fullest.peak / GIB:.1f} GiB, "
            f"score and update {plan.time.score + plan.time.update:.1f} s)"
        )
    return lines


def _names(tables: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _at(rank: RankMemory, moment: str) -> str:
    return f"{rank.at(moment) / GIB:.2f}" if moment in rank.moments else "-"


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>12}" for cell in cells)
