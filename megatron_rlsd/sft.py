"""Supervised warm start on the same actor, over student prompts and, for a share, privileged ones.

    torchrun --nproc-per-node N -m megatron_rlsd.sft CONFIG.yaml [key=value ...]

The target is ``prompts.sft_response``, or where the data line holds a conversation all turns of the
assistant in it, as tokens of the same trajectory that an environment makes of them.

The loss is the token mean of -log p(target) over each global batch. It goes through the same
operator as the policy loss: with advantage 1 and ratio 1 the two have the same gradient.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what may be missing is imported
    from megatron_rlsd.runtime.missing import tell_missing

    tell_missing()

import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.outcome import UpdateResult
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import Config
from megatron_rlsd.data import (
    Conversations,
    ProblemSource,
    PromptBuilder,
    PromptTooLong,
    build_sources,
)
from megatron_rlsd.diagnosis.before_run import refuse
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.run import assemble, main
from megatron_rlsd.runtime.errors import UserError


def train(config: Config) -> None:
    """Run ``sft.steps`` steps and write the weights to run_dir/hf/final."""
    steps = config.sft.steps
    with assemble(config, total_updates=steps, total_steps=steps, program="sft") as run:
        # Every rank draws the same examples; each keeps its data-parallel share.
        source = build_sources(
            config.data.train, config.train.seed, questions_per_step=config.sft.batch_size
        )
        progress = SftProgress(source)
        conversations = Conversations(config, run.tokenizer)
        start = run.continuity.resume(run.actor, {}, progress)
        run.colocation.servers_take_over()
        run.publish_weights(version=start)
        if config.eval.at_start and start == 0:
            run.evaluate(step=0)
        done, evaluated = start, -1
        while done < steps and not progress.reached(config.sft.stop_at_accuracy):
            with run.phase("data", done):
                batch = draw_examples(config, progress.source, run.prompts, conversations, done)
            with run.phase("update", done):
                run.colocation.trainer_takes_over()
                result = supervised_update(run.actor, batch.examples)
            metrics = sft_metrics(result) | batch.counts
            run.log.step(done, metrics)
            alarm = run.alarm(done, metrics)
            run.continuity.record_examples(done, batch.examples, batch.problem_ids, metrics)
            done += 1
            progress.accuracy = None
            if config.eval.interval and done % config.eval.interval == 0:
                run.colocation.servers_take_over()
                run.publish_weights(version=done)
                results, evaluated = run.evaluate(done), done
                progress.accuracy = sampled_accuracy(results)
            ended = done == steps or progress.reached(config.sft.stop_at_accuracy)
            run.end_of_step(done, last=ended, alarm=alarm)
        if start < done or not run.exported("final"):
            if evaluated != done:
                run.colocation.servers_take_over()
                run.publish_weights(version=done)
                run.evaluate(done)
            run.export_hf("final")
        run.log.summary()


class SftProgress:
    """Where the warm start stands: in its data, and by the evaluation after the last step."""

    def __init__(self, source: ProblemSource) -> None:
        self.source = source
        self.accuracy: float | None = None
        """None: there was no evaluation after the last step."""

    def reached(self, accuracy: float | None) -> bool:
        """Is the accuracy that ends the warm start asked for, and there?"""
        if accuracy is None or self.accuracy is None:
            return False
        return self.accuracy >= accuracy

    def state(self) -> dict[str, Any]:
        return {**self.source.state(), "accuracy": self.accuracy}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state(state)
        self.accuracy = state.get("accuracy")


def sampled_accuracy(results: dict[str, float]) -> float | None:
    """Sampled pass@1 of the first evaluation source."""
    return next((value for key, value in results.items() if key.endswith("sampled_pass@1")), None)


@dataclass(frozen=True)
class Batch:
    """The examples of one step."""

    examples: list[Sequence]
    problem_ids: list[str]
    """In the order of the examples."""
    counts: dict[str, float]
    """Metrics: how many were cut or left out."""


def draw_examples(
    config: Config,
    source: ProblemSource,
    prompts: PromptBuilder,
    conversations: Conversations,
    step: int,
) -> Batch:
    """``sft.batch_size`` examples; which of them are privileged is fixed by (seed, step).

    Those whose prompt and target are too long for the model are left out and counted.

    Raises UserError for a problem without the reference solution that the target uses, for a
    conversation that no episode could hold (``Conversations.target``), and where no prompt fits.
    """
    chooser = random.Random(f"sft/{config.train.seed}/{step}")
    examples: list[Sequence] = []
    problem_ids = []
    counts: Counter[str] = Counter(examples_too_long=0, hints_cut=0)
    for problem in source.next(config.sft.batch_size):
        privileged = chooser.random() < config.sft.privileged_share
        if problem.privileged is not None:
            privileged = problem.privileged
        loss_mask = None
        if problem.demonstration:
            ids, loss_mask = conversations.target(problem)
        else:
            ids = prompts.sft_target(problem)
        try:
            prompt = prompts.student(problem, following=len(ids))
            if privileged:
                hinted = prompts.privileged(problem, following=len(ids))
                prompt = hinted.ids or prompt
                counts["hints_cut"] += hinted.hint_cut
        except PromptTooLong as error:
            counts["examples_too_long"] += 1
            reason = error
            continue
        problem_ids.append(problem.id)
        examples.append(Sequence.of(prompt_ids=prompt, response_ids=ids, loss_mask=loss_mask))
    if not examples:
        raise UserError(
            f"all {config.sft.batch_size} examples of SFT step {step} are too long: {reason}"
        )
    metrics = {f"data/{name}": float(count) for name, count in counts.items()}
    return Batch(examples, problem_ids, metrics)


def supervised_update(actor: Actor, examples: list[Sequence]) -> UpdateResult:
    """One optimizer step on the token mean of -log p over the examples of all ranks."""
    parts = balanced_partition([e.num_inputs for e in examples], actor.groups.dp.size())
    by_rank = [[examples[i] for i in part] for part in parts]
    targets = sum(e.num_targets for e in examples)
    mine = sum(e.num_targets for e in by_rank[actor.groups.dp.rank()])
    device = actor.groups.device
    values = TokenValues(
        advantages=torch.ones(mine, device=device),
        loss_weights=torch.full((mine,), 1.0 / targets, device=device),
    )
    return actor.update(by_rank, values, PolicyLossConfig(rlsd_lambda=0.0), temperature=1.0)


def sft_metrics(result: UpdateResult) -> dict[str, float]:
    """Cross-entropy in nats per target token, and how the step went."""
    tokens = max(1.0, result.sums["tokens"])
    return {
        "train/loss": -result.sums["log_prob"] / tokens,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.learning_rate,
        "train/updates_skipped": float(result.skipped),
        "train/target_tokens": tokens,
        "train/tokens": result.tokens,
        "train/padding_share": result.padding / max(1, result.tokens),
    }


if __name__ == "__main__":
    sys.exit(main(train, sys.argv[1:], __doc__ or "", refuse))
