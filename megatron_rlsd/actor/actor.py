"""The actor: passes over packed sequences with the model of this rank's layout.

Every method is collective: all ranks call it with the same sequences, sharded by data-parallel
rank; of the other ranks' sequences only the lengths are looked at (``Elsewhere``). R is the number
of response tokens of this data-parallel rank, in the order of its sequences; its context-parallel
ranks, which share those sequences, all give and get all R.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListOf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_rlsd.actor.balance import StepPlan, pack_shape, plan_micro_batches
from megatron_rlsd.actor.engine_attention import require_fused_attention
from megatron_rlsd.actor.masters import (
    Exact,
    forget_loaded_values,
    loaded_values,
    remake_parameters,
    set_masters,
)
from megatron_rlsd.actor.model import Head, HeadGPTModel, build_model, transformer_config
from megatron_rlsd.actor.offload import HostOffload
from megatron_rlsd.actor.optimizer import (
    build_optimizer,
    learning_rate,
    named_parameters,
    wrap_data_parallel,
)
from megatron_rlsd.actor.outcome import OptimizerStep, UpdateResult, all_finite, reduce_outcome
from megatron_rlsd.actor.packing import (
    Elsewhere,
    MicroBatch,
    Sequence,
    build_micro_batch,
    response_offsets,
)
from megatron_rlsd.actor.precision import layer_kind
from megatron_rlsd.actor.routing_replay import RoutingReplay
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.actor.userbuffers import start_userbuffers
from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import Family, export_hf_tensors, load_hf_weights
from megatron_rlsd.hf_bridge.quantized import is_quantized, set_values
from megatron_rlsd.ops import (
    KeptTokens,
    PolicyLossConfig,
    PolicyLossStats,
    divergence_loss,
    policy_loss,
    token_log_probs,
    truncated_log_probs,
)
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.groups import ParallelGroups

SequencesByRank = ListOf[ListOf[Sequence | Elsewhere]]
"""For each data-parallel rank; this rank's own are all here."""


class Actor:
    """Model, optimizer and schedule of one rank.

    ``total_updates`` fixes the length of the learning-rate schedule; None builds no optimizer.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        hf_config: dict[str, Any],
        groups: ParallelGroups,
        total_updates: int | None,
    ) -> None:
        self.family, self.hf_config, self.groups = family, hf_config, groups
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        """Told of (micro-batches of a pass that went forward on this rank, all of them)."""
        self.vocab_size: int = hf_config["vocab_size"]
        self._max_tokens = config.train.max_tokens_per_microbatch
        self._pack_shape = pack_shape(
            config.parallel, config.pack_multiple, config.fixed_pack_length
        )
        shape = family.dims(hf_config)
        check_eight_bit(shape, config.parallel, config.model.precision)
        kind = layer_kind(config.model.precision, groups.device)
        self._config = transformer_config(config.model, config.parallel, family, hf_config, kind)
        if kind == "transformer_engine":
            require_fused_attention(self._config, groups.device)
        start_userbuffers(config, shape, kind, groups)
        self.chunks: list[HeadGPTModel] = build_model(
            self._config,
            family,
            hf_config,
            groups,
            kind,
            gradients_in_place=total_updates is not None
            and kind == "transformer_engine"
            and "weight_gradient" not in config.model.disabled_fusions,
        )
        if config.algorithm.routing_replay == "rollout":
            for chunk in self.chunks:
                chunk.routing = RoutingReplay(chunk, self._config, groups.tp)
        # Before the optimizer, whose float32 master copy of 16-bit weights is made from them.
        self.load_hf(Path(config.model.hf_path))
        exact = loaded_values(self.parameters())
        self._model: list[Any] = list(self.chunks)
        self._gathers_late = config.optimizer.overlap_param_gather
        if total_updates is not None:
            self._model = wrap_data_parallel(self.chunks, self._config, config.optimizer, groups)
            self._optimizer, self._scheduler = build_optimizer(
                self._model, self._config, config.optimizer, total_updates
            )
            self._offload = HostOffload(self._model, self._optimizer, groups.device)
            if exact:
                set_masters(self._optimizer, exact)
                self.remake_parameters()
        forget_loaded_values(exact)

    def load_hf(self, hf_path: Path) -> None:
        """Fill every parameter from HF safetensors; raises if one is missing or left over."""
        load_hf_weights(
            self.chunks,
            hf_path,
            self.family,
            self.hf_config,
            layout=self.groups.shard_layout,
        )

    def take_values(self, exact: Exact) -> None:
        """Take over all values of these 8-bit parameters (none: nothing happens), into the masters
        without rounding. Collective."""
        for parameter, new in exact.items():
            set_values(parameter, new)
        if exact and self.trains:
            set_masters(self._optimizer, exact)
            self.remake_parameters()

    def remake_parameters(self) -> None:
        """Make 8-bit parameters, where there are any, of the masters. Collective."""
        if any(is_quantized(parameter) for parameter in self.parameters().values()):
            remake_parameters(self._optimizer, self._model)

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights as full HF-named tensors, on every rank, in one fixed order."""
        return export_hf_tensors(
            self.chunks,
            self.family,
            self.hf_config,
            tp_group=self.groups.tp,
            pp_group=self.groups.pp,
            ep_group=self.groups.ep,
            etp_group=self.groups.expert_tp,
        )

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by name: what teacher snapshots are made of."""
        return named_parameters(self.chunks)

    @property
    def trains(self) -> bool:
        """Was it built with an optimizer?"""
        return hasattr(self, "_optimizer")

    @property
    def optimizer(self) -> MegatronOptimizer:
        """For checkpoints."""
        return self._optimizer

    @property
    def scheduler(self) -> OptimizerParamScheduler:
        return self._scheduler

    def make_room(self) -> None:
        """Move optimizer state to main memory and free the gradients, until ``take_room``."""
        if self.trains:
            self._offload.offload()

    def take_room(self) -> None:
        if self.trains:
            self._offload.onload()

    def token_log_probs(
        self,
        sequences_by_rank: SequencesByRank,
        temperature: float,
        kept: KeptTokens | None = None,
    ) -> Tensor | None:
        """Log-probabilities [R] of every response token; None on ranks before the last stage.

        ``kept``: sets of the R tokens, over which alone the softmax goes.
        """

        def score(rows: Tensor, weight: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
            return self._head_scores(rows, weight, targets, temperature, _chosen(kept, indices))[0]

        return self._score(sequences_by_rank, score, ())

    def token_log_probs_and_entropy(
        self,
        sequences_by_rank: SequencesByRank,
        temperature: float,
        kept: KeptTokens | None = None,
    ) -> Tensor | None:
        """[R, 2]: ``token_log_probs``, and the entropy of the token's distribution in nats."""

        def score(rows: Tensor, weight: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
            log_probs, entropy = self._head_scores(
                rows, weight, targets, temperature, _chosen(kept, indices), with_entropy=True
            )
            assert entropy is not None
            return torch.stack([log_probs, entropy], dim=1)

        return self._score(sequences_by_rank, score, (2,))

    def truncated_log_probs(
        self, sequences_by_rank: SequencesByRank, temperature: float, *, top_p: float, top_k: int
    ) -> tuple[Tensor, KeptTokens] | None:
        """What sampling with top_p and top_k could have drawn at every response token.

        Returns [R, 3], as ``ops.TruncatedScores``: the token's log-probability over its set, the
        set's log mass, and 1 where the token belongs to it by its own logit, else 0; and the R
        sets. None before the last stage.
        """
        parts: list[tuple[Tensor, KeptTokens]] = []

        def score(rows: Tensor, weight: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
            found = truncated_log_probs(
                *(rows, weight, targets),
                top_p=top_p,
                top_k=top_k,
                temperature=temperature,
                tp_group=self.groups.tp,
                vocab_size=self.vocab_size,
            )
            parts.append((indices, found.kept))
            likely = found.target_is_likely.to(found.log_probs)
            return torch.stack([found.log_probs, found.log_mass, likely], dim=1)

        flat = self._score(sequences_by_rank, score, (3,))
        if flat is None:
            return None
        kept = KeptTokens.joined([sets for _, sets in parts], self.groups.device)
        kept = kept.placed(torch.cat([indices for indices, _ in parts]), len(flat))
        return flat, kept.summed_over(self.groups.cp) if self.groups.cp.size() > 1 else kept

    def _head_scores(
        self,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        kept: KeptTokens | None,
        *,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return token_log_probs(
            rows,
            weight,
            targets,
            temperature=temperature,
            tp_group=self.groups.tp,
            vocab_size=self.vocab_size,
            with_entropy=with_entropy,
            kept=kept,
        )

    def token_states(self, sequences_by_rank: SequencesByRank) -> tuple[Tensor, Tensor] | None:
        """What the head makes every response token's distribution from; None before the last stage.

        Returns the last hidden states [R, D] in the model's precision, and a copy of the head's
        weight [V / tp, D], which an optimizer step does not change.
        """
        weights: list[Tensor] = []

        def keep(rows: Tensor, weight: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
            if not weights:
                weights.append(weight.detach().clone())
            return rows

        states = self._score(
            sequences_by_rank, keep, (self._config.hidden_size,), self._config.params_dtype
        )
        return None if states is None else (states, weights[0])

    def _score(
        self,
        sequences_by_rank: SequencesByRank,
        score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        width: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """``score(rows, weight, targets, their places among the R)`` [n, *width] of every response
        token, [R, *width]."""

        def head_for(micro_batch: MicroBatch) -> Head:
            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                positions = micro_batch.response_positions
                rows = self._full_rows(hidden)[positions]
                targets, indices = micro_batch.targets[positions], micro_batch.response_indices
                return score(rows, weight, targets, indices).to(dtype)

            return head

        plan, micro_batches = self._micro_batches(sequences_by_rank)
        with torch.no_grad():
            outputs = self._run(plan, micro_batches, head_for, forward_only=True)
        if not self.groups.is_last_stage:
            return None
        total = sum(s.num_targets for s in _held(sequences_by_rank[self.groups.dp.rank()]))
        flat = torch.zeros(total, *width, dtype=dtype, device=self.groups.device)
        for micro_batch, values in zip(micro_batches, outputs, strict=True):
            flat[micro_batch.response_indices] = values
        # Each context-parallel rank has filled in the tokens that it holds.
        dist.all_reduce(flat, group=self.groups.cp)
        return flat

    def update(
        self,
        sequences_by_rank: SequencesByRank,
        values: TokenValues,
        loss_config: PolicyLossConfig,
        temperature: float,
        *,
        with_entropy: bool = False,
        on_tokens: Callable[[MicroBatch, PolicyLossStats], None] | None = None,
        another_follows: bool = False,
    ) -> UpdateResult:
        """One optimizer step on the policy loss over the sequences of all data-parallel ranks.

        ``on_tokens`` gets each micro-batch's per-token results, where the loss is formed.
        ``another_follows``: nothing but another update comes next, so that it may gather the new
        weights (optimizer.overlap_param_gather).
        """
        collected: list[PolicyLossStats] = []
        divergence = torch.zeros(3, dtype=torch.float64)  # weighted, plain, counted tokens

        def distil(micro_batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
            teacher = values.distillation
            assert teacher is not None
            chosen = micro_batch.response_indices
            weights = teacher.loss_weights[chosen]
            loss, each = divergence_loss(
                hidden,
                weight,
                teacher.hidden[chosen],
                teacher.weight,
                micro_batch.response_positions,
                loss_weights=weights,
                config=teacher.config,
                temperature=temperature,
                tp_group=self.groups.tp,
                sequence_parallel=self._config.sequence_parallel,
                vocab_size=self.vocab_size,
                weight_main_grad=getattr(weight, "main_grad", None),
                grad_scale=self._optimizer.get_loss_scale(),
            )
            sums = [(weights.double() * each.double()).sum(), each.double().sum()]
            divergence.add_(torch.stack([*sums, (weights != 0).double().sum()]).cpu())
            return loss

        def head_for(micro_batch: MicroBatch) -> Head:
            def scatter(flat: Tensor | None) -> Tensor | None:
                return None if flat is None else micro_batch.scatter(flat)

            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                loss, stats = policy_loss(
                    hidden,
                    weight,
                    micro_batch.targets,
                    advantages=micro_batch.scatter(values.advantages),
                    loss_weights=micro_batch.scatter(values.loss_weights),
                    old_log_probs=scatter(values.old_log_probs),
                    teacher_log_probs=scatter(values.teacher_log_probs),
                    contrast_log_probs=scatter(values.contrast_log_probs),
                    ref_log_probs=scatter(values.ref_log_probs),
                    rollout_log_probs=scatter(values.rollout_log_probs),
                    proximal_share=scatter(values.proximal_share),
                    # Over the context-parallel ranks, which number the responses alike.
                    sequence_ids=micro_batch.sequence_ids,
                    cp_group=self.groups.cp,
                    config=loss_config,
                    temperature=temperature,
                    tp_group=self.groups.tp,
                    sequence_parallel=self._config.sequence_parallel,
                    vocab_size=self.vocab_size,
                    with_entropy=with_entropy,
                    kept=micro_batch.scatter_sets(values.kept),
                    # Megatron's float32 gradient of the weight, which needs no second one then.
                    weight_main_grad=getattr(weight, "main_grad", None),
                    grad_scale=self._optimizer.get_loss_scale(),
                )
                collected.append(stats)
                if on_tokens is not None:
                    on_tokens(micro_batch, stats)
                if values.distillation is not None:
                    loss = loss + distil(micro_batch, hidden, weight)
                return loss

            return head

        for chunk in self._model:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        plan, micro_batches = self._micro_batches(sequences_by_rank)
        self._run(plan, micro_batches, head_for, forward_only=False)
        rate = learning_rate(self._optimizer)
        succeeded, grad_norm = False, math.nan
        if all_finite(self._model, collected, divergence, self.groups):
            succeeded, grad_norm, _ = self._optimizer.step()
        if self._gathers_late and not another_follows:
            for chunk in self._model:
                chunk.start_param_sync(force_sync=True)
        self._scheduler.step(increment=1)
        step = OptimizerStep(succeeded, float(grad_norm), rate)
        return reduce_outcome(
            collected, divergence, plan, micro_batches, self.chunks, step, self.groups
        )

    def _run(
        self,
        plan: StepPlan,
        micro_batches: list[MicroBatch],
        head_for: Callable[[MicroBatch], Head],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule over the micro-batches; with ``forward_only`` the heads' results."""

        chunks, passed = len(self._model), itertools.count(1)

        def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            micro_batch = next(batches)
            output = model(
                micro_batch.tokens,
                micro_batch.position_ids,
                packed_seq_params=micro_batch.packed_seq_params,
                head=head_for(micro_batch),
                routed_experts=micro_batch.routed_experts,
            )
            if (count := next(passed)) % chunks == 0:
                self.on_progress(count // chunks, len(micro_batches))
            return output, finish

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                return output
            # 0 tokens: Megatron then leaves the gradients' scale alone; ours is in the loss.
            no_tokens = torch.zeros([], dtype=torch.int, device=output.device)
            return output, no_tokens, None

        iterators = [iter(micro_batches) for _ in range(chunks)]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if chunks > 1 else iterators[0],
            model=self._model if chunks > 1 else self._model[0],
            num_microbatches=len(micro_batches),
            # Between interleaved stages all packs have this length; others announce theirs.
            seq_length=plan.pack_lengths[self.groups.dp.rank()][0],
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _micro_batches(
        self, sequences_by_rank: SequencesByRank
    ) -> tuple[StepPlan, list[MicroBatch]]:
        """This rank's packs; every data-parallel rank makes the same number of them."""
        lengths = [[s.num_inputs for s in sequences] for sequences in sequences_by_rank]
        plan = plan_micro_batches(lengths, self._max_tokens, self._pack_shape)
        rank = self.groups.dp.rank()
        mine = _held(sequences_by_rank[rank])
        offsets = response_offsets(mine)
        return plan, [
            build_micro_batch(
                mine,
                members,
                offsets,
                pack_length=pack_length,
                shape=self._pack_shape,
                cp_rank=self.groups.cp.rank(),
                cp_size=self.groups.cp.size(),
                device=self.groups.device,
            )
            for members, pack_length in zip(
                plan.members[rank], plan.pack_lengths[rank], strict=True
            )
        ]

    def _full_rows(self, hidden: Tensor) -> Tensor:
        """[T / tp, D] under sequence parallelism -> [T, D]; no gradient."""
        if not self._config.sequence_parallel:
            return hidden
        tp = self.groups.tp
        full = hidden.new_empty(hidden.shape[0] * tp.size(), hidden.shape[1])
        dist.all_gather_into_tensor(full, hidden.contiguous(), group=tp)
        return full


def _chosen(kept: KeptTokens | None, indices: Tensor) -> KeptTokens | None:
    return None if kept is None else kept.select(indices)


def _held(sequences: ListOf[Sequence | Elsewhere]) -> list[Sequence]:
    """A rank's own sequences, which are all here."""
    held = [each for each in sequences if isinstance(each, Sequence)]
    assert len(held) == len(sequences), "a rank was not given its own sequences"
    return held
