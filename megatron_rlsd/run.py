"""Assembles a run from its configuration: the parts that the training loops work with."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.checkpoint.manifest import CheckpointError
from megatron_rlsd.checkpoint.start import Program
from megatron_rlsd.config import Config, ConfigError, dump_config, load_config
from megatron_rlsd.continuity import Continuity, continuity
from megatron_rlsd.credit import CreditCollector, attach_credit
from megatron_rlsd.data import (
    DataError,
    PromptBuilder,
    Tokenizer,
    TokenizerError,
    build_sources,
    evaluation_problems,
    load_tokenizer,
)
from megatron_rlsd.engines import Publisher, TrainerEngine, rollout_engine
from megatron_rlsd.environments import EnvironmentPool, EpisodeError
from megatron_rlsd.episodes import Episodes
from megatron_rlsd.evaluation import evaluate
from megatron_rlsd.experience import Experience, ExperienceError, train_batch, trained
from megatron_rlsd.hf_bridge import (
    HFBridgeError,
    family_for,
    load_hf_config,
    save_hf_folder,
)
from megatron_rlsd.lifecycle import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LostRankError,
    Preempted,
    stop_with_launcher,
    write_status,
)
from megatron_rlsd.observability import MetricsLogger
from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    gather_bytes,
    pack_train_batch,
    unpack_train_batch,
)
from megatron_rlsd.parallel.groups import ParallelGroups, parallel_world
from megatron_rlsd.parallel.layout import LayoutError, model_shape
from megatron_rlsd.platform import PlatformError
from megatron_rlsd.recording import BadStepsError, RecordingError
from megatron_rlsd.rewards import RewardError, RewardPool
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.rollout_stream import RolloutStream
from megatron_rlsd.teacher.external import ExternalTeacherError
from megatron_rlsd.types import Group, Problem, TrainBatch
from megatron_rlsd.weight_sync import WeightSyncError

USER_ERRORS = (
    BadStepsError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    EpisodeError,
    ExperienceError,
    ExternalTeacherError,
    HFBridgeError,
    LayoutError,
    PlatformError,
    RecordingError,
    RewardError,
    TokenizerError,
    WeightSyncError,
)
"""What a user can mend: reported by message, without a traceback."""


@dataclass
class Run:
    """One rank's parts. ``experience``, ``rollouts`` and ``eval_problems``: on rank 0 only."""

    config: Config
    groups: ParallelGroups
    tokenizer: Tokenizer
    prompts: PromptBuilder
    actor: Actor
    log: MetricsLogger
    engine: TrainerEngine
    experience: Experience | None
    rollouts: Experience | RolloutStream | None
    """Where training batches come from."""
    eval_problems: dict[str, list[Problem]]
    continuity: Continuity
    publisher: Publisher

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """A part of a step: timed, and known to the other ranks' watchdogs."""
        with self.continuity.watchdog.phase(name, step), self.log.phase(name):
            yield

    def rollout(self, step: int) -> tuple[list[Group], TrainBatch, dict[str, float]]:
        """Sampled and rewarded: groups and metrics on rank 0, the batch on every rank."""

        def work() -> tuple[list[Group], dict[str, float]]:
            assert self.rollouts is not None
            return self.rollouts.collect(step)

        groups, metrics = self.engine.run_on_rank_zero(work) or ([], {})
        if self.config.rollout.colocated and self.actor.trains:
            assert isinstance(self.engine, ServedEngine)
            self.engine.sleep()
            self.actor.take_room()
        payload = pack_train_batch(train_batch(groups)) if self.groups.rank == 0 else None
        batch = unpack_train_batch(broadcast_bytes(payload, self.groups.control))
        return groups, batch, metrics

    def publish_weights(self, version: int) -> dict[str, float]:
        """Hand the actor's current weights to the rollout engine; metrics on rank 0.

        Colocated servers wake for it; they sleep again after the next rollout.
        """
        if self.config.rollout.colocated:
            self.actor.make_room()
        metrics = self.publisher.publish(self.actor, version)
        if isinstance(self.rollouts, RolloutStream):
            self.rollouts.published(version)
        return metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the published weights on the held-out problems, after ``step`` steps.

        The results are the same on every rank; empty without evaluation sources.
        """
        if not self.config.data.eval:
            return {}

        def work() -> bytes:
            assert self.experience is not None
            results = evaluate(self.experience, self.eval_problems, self.config.eval)
            self.log.evaluation(step, results)
            return json.dumps(results).encode()

        with self.phase("evaluation", step):
            payload = self.engine.run_on_rank_zero(work)
            return json.loads(broadcast_bytes(payload, self.groups.control))

    def log_samples(self, step: int, groups: list[Group], credit: CreditCollector) -> None:
        """Dump the step's first groups with what the update made of each token."""
        if self.config.observability.samples_per_step:
            payloads = gather_bytes(credit.pack(), self.groups.control)
            if payloads is not None:
                attach_credit(trained(groups), payloads)
            self.log.samples(step, groups, self.tokenizer.decode)

    def exported(self, name: str) -> bool:
        """Was run_dir/hf/``name`` written before this run was resumed? The same on all ranks."""
        found = (
            self.continuity.start.continues
            and (Path(self.config.run_dir) / "hf" / name / "config.json").is_file()
        )
        return broadcast_bytes(b"1" if found else b"", self.groups.control) == b"1"

    def export_hf(self, name: str) -> Path:
        """Write the current weights as a HF folder run_dir/hf/``name``."""
        out = Path(self.config.run_dir) / "hf" / name
        save_hf_folder(
            self.actor.hf_tensors(),
            out,
            Path(self.config.model.hf_path),
            is_writer=self.groups.rank == 0,
        )
        return out


@contextmanager
def assemble(
    config: Config, *, total_updates: int | None, total_steps: int, program: Program = "train"
) -> Iterator[Run]:
    """Build every part on every rank; rank 0 also gets the data, the rewards and the logger.

    ``total_updates`` None: the actor gets no optimizer.
    """
    hf_path = Path(config.model.hf_path)
    hf_config = load_hf_config(hf_path)
    family = family_for(hf_config)
    with ExitStack() as stack:
        groups = stack.enter_context(
            parallel_world(
                config.parallel,
                model_shape(family, hf_config),
                timeout_seconds=config.distributed.timeout_seconds,
                seed=config.train.seed,
            )
        )
        kept = stack.enter_context(continuity(config, hf_config, groups, program))
        tokenizer = load_tokenizer(config.tokenizer, hf_path)
        if tokenizer.vocab_size > hf_config["vocab_size"]:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model in {hf_path} embeds "
                f"{hf_config['vocab_size']}"
            )
        prompts = PromptBuilder(config.prompts, config.teacher, tokenizer)
        run_dir = Path(config.run_dir)
        if groups.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            dump_config(config, run_dir / "config.yaml")
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
            )
        )
        engine, publisher = stack.enter_context(rollout_engine(config, groups, hf_config, prompts))
        rewards, environments, experience, eval_problems = None, None, None, {}
        rollouts: Experience | RolloutStream | None = None
        if groups.rank == 0:
            # Its workers import their libraries while the model is built.
            rewards = stack.enter_context(RewardPool(config.reward))
            source = build_sources(config.data.train, config.train.seed)
            for note in source.notes():
                print(note, flush=True)
            episodes = None
            if config.environment.name is not None:
                environments = stack.enter_context(EnvironmentPool(config.environment))
                episodes = Episodes(config, prompts, tokenizer, engine, environments)
            experience = Experience(config, source, prompts, tokenizer, engine, rewards, episodes)
            rollouts = experience
            if config.rollout.asynchronous.max_staleness and program == "train":
                assert isinstance(engine, ServedEngine)
                rollouts = stream = RolloutStream(config, experience, engine, log.span)
                stack.callback(stream.close)
            for number, each in enumerate(config.data.eval):
                problems = evaluation_problems(each, config.eval.num_problems)
                name = problems[0].source
                eval_problems[name if name not in eval_problems else f"{name}.{number}"] = problems
        actor = Actor(config, family, hf_config, groups, total_updates)
        if rewards is not None:
            rewards.wait_until_ready()
        if environments is not None:
            environments.wait_until_ready()
        yield Run(
            *(config, groups, tokenizer, prompts, actor, log, engine),
            experience=experience,
            rollouts=rollouts,
            eval_problems=eval_problems,
            continuity=kept,
            publisher=publisher,
        )


def main(command: Callable[[Config], None], argv: list[str], usage: str) -> int:
    """Parse ``CONFIG.yaml [key=value ...]`` and run; a user's mistake is told in one message."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    try:
        config = load_config(argv[0], argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    stop_with_launcher()
    write_status(config.run_dir, None)
    status, code, message = "finished", 0, ""
    try:
        command(config)
    except Preempted as stop:
        status, code, message = "preempted", EXIT_PREEMPTED, str(stop)
        print(f"{message}; exit code {code}", file=sys.stderr)
    except USER_ERRORS as error:
        status, code, message = "failed", EXIT_USER_ERROR, f"error: {error}"
        print(message, file=sys.stderr)
    except Exception as error:
        code = EXIT_LOST_RANK if isinstance(error, LostRankError) else EXIT_FAILED
        status, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write_status(config.run_dir, status, code, message)
    return code
