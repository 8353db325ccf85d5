"""Assembles a run from its configuration: builds every part and closes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.slow_paths import slow_paths
from megatron_rlsd.checkpoint.start import Program, Start
from megatron_rlsd.config import Config, dump_config
from megatron_rlsd.data import (
    build_sources,
    evaluation_sets,
    load_tokenizer,
    warn_of_other_ids,
)
from megatron_rlsd.data.positions import build_prompts
from megatron_rlsd.experience import GroupBuilder, Questions, build_collector
from megatron_rlsd.experience.playing import BackgroundPlayer, open_player
from megatron_rlsd.experience.questions import fitting
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.observability import MetricsLogger
from megatron_rlsd.observability.alarms import Alarms
from megatron_rlsd.observability.no_signal import SignalWatch
from megatron_rlsd.parallel.exchange import from_rank_zero, gather_bytes
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.recovery.continuity import continuity, show_notes
from megatron_rlsd.recovery.watchdog import Watchdog
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.rollout.sglang import set_nccl_switches
from megatron_rlsd.run.colocation import Colocation
from megatron_rlsd.run.folders import owned_folders
from megatron_rlsd.run.model_files import ModelFiles, refuse_to_write_over_the_model
from megatron_rlsd.run.run import Run
from megatron_rlsd.run.speed import Speed
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import EXIT_LOST_RANK, write_status
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.weight_sync import rollout_engine


@contextmanager
def assemble(
    config: Config, *, total_updates: int | None, total_steps: int, program: Program = "train"
) -> Iterator[Run]:
    """Build every part on every rank; rank 0 also gets the data, the rewards and the logger.

    ``total_updates`` None: the actor gets no optimizer.
    """
    hf_path = Path(config.model.hf_path)
    if program != "rollout_only":
        refuse_to_write_over_the_model(config)
    hf_config = load_hf_config(hf_path)
    family = family_for(hf_config)
    set_nccl_switches(config)

    def ends(message: str, rank_zero: bool) -> None:
        code = EXIT_LOST_RANK
        write_status(config.run_dir, "failed", code, message, for_rank_zero=rank_zero)

    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.distributed.stall_seconds, ends))
        groups = stack.enter_context(
            parallel_world(
                config.parallel,
                family.dims(hf_config),
                timeout_seconds=config.distributed.timeout_seconds,
                seed=config.train.seed,
                store=watchdog.store,
            )
        )
        stack.enter_context(owned_folders(config, groups.control))
        tokenizer = load_tokenizer(config.tokenizer, hf_path)
        if tokenizer.vocab_size > hf_config["vocab_size"]:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model in {hf_path} embeds "
                f"{hf_config['vocab_size']}"
            )
        files = ModelFiles(config, hf_config, tokenizer)
        kept = stack.enter_context(
            continuity(config, hf_config, groups, program, watchdog, files.write_with_config)
        )
        prompts = build_prompts(config, hf_config, tokenizer)
        run_dir = Path(config.run_dir)
        from_rank_zero(partial(dump_config, config, run_dir / "config.yaml"), groups.control)
        log = stack.enter_context(
            MetricsLogger(
                run_dir,
                config.observability,
                total_steps,
                resume_step=kept.start.step if kept.start.continues else None,
                enabled=groups.rank == 0,
                rank=groups.rank,
                gather=partial(gather_bytes, group=groups.control),
                settings=config.model_dump(mode="json"),
                derive=Speed(config, family.dims(hf_config), groups.world_size, groups.device),
            )
        )

        def starts_elsewhere(start: Start) -> None:
            if groups.rank == 0:
                show_notes(start)
            log.rewind(start.step)

        kept.starting_point.on_change = starts_elsewhere
        log.starting("rollout engine")
        engine, publisher = stack.enter_context(rollout_engine(config, groups, hf_config, prompts))
        rewards, episodes, builder, collector, eval_problems = None, None, None, None, {}
        if groups.rank == 0:
            log.starting("data and rewards")
            # Its workers import their libraries while the model is built.
            rewards = stack.enter_context(RewardPool(config.reward))
            source = build_sources(
                config.data.train,
                config.train.seed,
                questions_per_step=config.rollout.prompts_per_step,
                curriculum=config.data.curriculum,
            )
            for note in source.notes():
                print(note, flush=True)
            beside = program == "train" and config.rollout.asynchronous.max_staleness > 0
            submit = engine.submit if beside else None
            episodes = stack.enter_context(open_player(config, prompts, tokenizer, engine, submit))
            builder = GroupBuilder(config, prompts, tokenizer, engine, rewards, episodes)
            collector = build_collector(
                config,
                Questions(source, prompts),
                builder,
                engine,
                log.span,
                log.count,
                beside_training=program == "train",
                player=episodes if isinstance(episodes, BackgroundPlayer) else None,
            )
            stack.callback(collector.close)
            eval_problems = {
                name: fitting(problems, prompts, name, config.eval_response_tokens)
                for name, problems in evaluation_sets(
                    config.data.eval, config.eval.num_problems
                ).items()
            }
        log.starting("model")
        actor = Actor(config, family, hf_config, groups, total_updates)
        if groups.rank == 0:
            warn_of_other_ids(tokenizer)
            for slow in slow_paths(config, groups.device):
                warn(slow)
            report_progress(log, engine, actor, config)
            log.starting("reward workers")
        if rewards is not None:
            rewards.wait_until_ready()
        if episodes is not None:
            episodes.wait_until_ready()
        log.starting("checkpoint and first weights")
        yield Run(
            *(config, groups, tokenizer, files, prompts, actor, log, engine),
            builder=builder,
            collector=collector,
            eval_problems=eval_problems,
            continuity=kept,
            publisher=publisher,
            alarms=Alarms(config.alarms),
            signal=SignalWatch(config, total_steps),
            colocation=Colocation(actor, engine, groups.control, shared=config.rollout.colocated),
        )


def report_progress(
    log: MetricsLogger, engine: TrainerEngine, actor: Actor, config: Config
) -> None:
    """Let what takes long within a phase count: responses, and micro-batches of a pass."""
    # The embedded engine of each rank answers a share of the requests.
    alone = config.rollout.engine == "sglang" or actor.groups.world_size == 1
    responses = "responses" if alone else "responses of rank 0"
    engine.on_progress = lambda done, total: log.count(done, total, responses)
    actor.on_progress = lambda done, total: log.count(done, total, "micro-batches")
