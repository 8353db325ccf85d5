"""A run: one rank's parts, and what the training loops do with several of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.config import Config
from megatron_rlsd.data import PromptBuilder, Tokenizer
from megatron_rlsd.experience import Collector, GroupBuilder, train_batch, trained
from megatron_rlsd.experience.evaluation import evaluate
from megatron_rlsd.experience.questions import fitting
from megatron_rlsd.hf_bridge import save_hf_folder
from megatron_rlsd.learner import Plan
from megatron_rlsd.learner.credit import CreditCollector, attach_credit
from megatron_rlsd.observability import MetricsLogger
from megatron_rlsd.observability.alarms import Alarms
from megatron_rlsd.observability.no_signal import SignalWatch
from megatron_rlsd.observability.trace import named
from megatron_rlsd.parallel.exchange import (
    broadcast_bytes,
    gather_bytes,
)
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.row_sharing import share_outlines, share_rows
from megatron_rlsd.recovery.continuity import Continuity
from megatron_rlsd.rollout.engine import TrainerEngine
from megatron_rlsd.run.colocation import Colocation
from megatron_rlsd.run.model_files import ModelFiles
from megatron_rlsd.run.sampling import Batch, Sampling
from megatron_rlsd.types import Group, Problem
from megatron_rlsd.weight_sync import Publisher


@dataclass
class Run:
    """One rank's parts. ``builder``, ``collector`` and ``eval_problems``: on rank 0 only."""

    config: Config
    process_groups: ParallelGroups
    tokenizer: Tokenizer
    files: ModelFiles
    prompts: PromptBuilder
    actor: Actor
    log: MetricsLogger
    engine: TrainerEngine
    builder: GroupBuilder | None
    collector: Collector | None
    """Where training batches come from."""
    eval_problems: dict[str, list[Problem]]
    continuity: Continuity
    publisher: Publisher
    alarms: Alarms
    signal: SignalWatch
    colocation: Colocation

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """A part of a step: timed, named in profiles, and known to the other ranks' watchdogs."""
        with self.continuity.watchdog.phase(name, step), self.log.phase(name), named(name):
            yield

    def rollout(self, step: int) -> Batch:
        """Sampled and rewarded: groups, metrics and rows on rank 0, outlines on every rank."""

        def work() -> tuple[list[Group], dict[str, float]]:
            assert self.collector is not None
            return self.collector.collect(step)

        groups, metrics = self.engine.run_on_rank_zero(work) or ([], {})
        batch = None
        if self.process_groups.rank == 0:
            batch = train_batch(groups, mask_truncated=self.config.algorithm.mask_truncated)
        return groups, share_outlines(batch, self.process_groups), metrics

    def sampling(self, step: int) -> Sampling:
        """``rollout`` in two parts: what comes first, to be scored meanwhile, and the whole batch.

        Nothing comes first where the ranks or their devices are needed to sample, and where the
        batch is sampled beside training anyway (``Config.scores_while_sampling``).
        """
        return Sampling(
            self.collector,
            step,
            self.process_groups,
            None if self.config.scores_while_sampling else partial(self.rollout, step),
            mask_truncated=self.config.algorithm.mask_truncated,
        )

    def hand_out(self, plan: Plan) -> Plan:
        """The plan with the rows that this rank scores and trains on, which come from rank 0."""
        rows = [
            sorted(row for each in plan.mini_batches for row in each.by_rank[rank])
            for rank in range(self.process_groups.dp.size())
        ]
        return replace(plan, batch=share_rows(plan.batch, rows, self.process_groups))

    def alarm(
        self, step: int, metrics: dict[str, float], groups: Sequence[Group] = ()
    ) -> str | None:
        """Warn where a step says that the run drifts or learns nothing; why it should stop, if so,
        on rank 0."""
        if self.process_groups.rank:
            return None
        reasons = (self.alarms.check(step, metrics), self.signal.check(step, metrics, groups))
        return "; ".join(filter(None, reasons)) or None

    def publish_weights(self, version: int) -> dict[str, float]:
        """Hand the actor's current weights to the rollout engine; metrics on rank 0.

        It is the servers' turn with the devices (``colocation.servers_take_over``).
        """
        metrics = self.publisher.publish(self.actor, version)
        self.colocation.weights_arrived()
        metrics |= self.publisher.check(self.actor, version)
        if (longest := self.engine.longest_prompt) is not None:
            self.prompts.serve_at_most(longest)
        if self.collector is not None:
            self.collector.published(version)
        return metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the published weights on the held-out problems, after ``step`` steps.

        The results are the same on every rank; empty without evaluation sources.
        """
        if not self.config.data.eval:
            return {}

        def work() -> bytes:
            assert self.builder is not None
            problems = {
                # Servers may take shorter prompts than the model has positions for.
                name: fitting(some, self.prompts, name, self.config.eval_response_tokens)
                for name, some in self.eval_problems.items()
            }
            results = evaluate(self.builder, problems, self.config)
            self.log.evaluation(step, results)
            return json.dumps(results).encode()

        with self.phase("evaluation", step):
            payload = self.engine.run_on_rank_zero(work)
            return json.loads(broadcast_bytes(payload, self.process_groups.control))

    def end_of_step(self, done: int, *, last: bool, alarm: str | None = None) -> None:
        """After ``done`` steps: export and save what is due; see ``Continuity.end_of_step``."""
        interval = self.config.checkpoint.hf_export_interval
        if interval and done % interval == 0:
            self.export_hf(f"step_{done}")
        with self.phase("checkpoint", done - 1):
            self.continuity.end_of_step(done, last=last, alarm=alarm)

    def log_samples(self, step: int, groups: list[Group], credit: CreditCollector) -> None:
        """Dump the step's first groups with what the update made of each token."""
        if self.config.observability.samples_per_step:
            payloads = gather_bytes(credit.pack(), self.process_groups.control)
            if payloads is not None:
                attach_credit(trained(groups), payloads)
            self.log.samples(step, groups, self.tokenizer.decode)

    def exported(self, name: str) -> bool:
        """Was run_dir/hf/``name`` written before this run was resumed? The same on all ranks."""
        found = (
            self.continuity.start.continues
            and (Path(self.config.run_dir) / "hf" / name / "config.json").is_file()
        )
        return broadcast_bytes(b"1" if found else b"", self.process_groups.control) == b"1"

    def export_hf(self, name: str) -> Path:
        """Write the current weights as a HF folder run_dir/hf/``name``."""
        out = Path(self.config.run_dir) / "hf" / name
        save_hf_folder(
            self.actor.hf_tensors(),
            out,
            self.files.hf_config,
            companions=self.files.write,
            is_writer=self.process_groups.rank == 0,
        )
        return out
