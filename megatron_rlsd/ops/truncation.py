"""What a sampler with top-p and top-k could have drawn, found again from the trainer's logits.

    K = {v: rank(v) < top_k and the softmax's mass of all likelier tokens < top_p}, and the target

Both count over the whole vocabulary, as SGLang's samplers do: top-p is a share of all mass, not of
the top_k tokens'. Of equal logits the order is not defined.

Shapes: N rows, C of a chunk, V vocabulary rows of this rank that are no padding, V_local with
padding, R ranks of tp_group, S candidates of a rank, M tokens of all sets together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsd.ops import checks
from megatron_rlsd.ops.chunks import NO_LOGIT
from megatron_rlsd.ops.collectives import gather_partials, merge_partials
from megatron_rlsd.ops.divergence_rows import logits_of
from megatron_rlsd.ops.head import VocabShard
from megatron_rlsd.ops.kept_tokens import KeptTokens

BUDGET_BYTES = {"cpu": 40 * 2**20, "cuda": 1024 * 2**20}
"""Memory of a chunk: its logits, and again as much for what is made of them."""
VOCAB_BLOCK = 4096
"""Vocabulary rows that are converted at once where the weight has 16 bits."""
FIRST_CANDIDATES = 64
"""Likeliest tokens of each rank that are looked at first where only top-p ends a set."""


@dataclass(frozen=True, eq=False)
class TruncatedScores:
    """Log-probabilities of N targets among the tokens that could have been drawn."""

    log_probs: Tensor
    """[N] log softmax of the target over its row's set alone."""
    log_mass: Tensor
    """[N] log of the set's share of the whole softmax, at most 0: the log softmax of the target
    over the whole vocabulary is log_probs + log_mass."""
    entropy: Tensor
    """[N] of the softmax over the set, in nats."""
    target_is_likely: Tensor
    """[N] bool: the target belongs to the set by its own logit. If not, it was added: another
    engine drew it, whose numbers differ a little, or whose weights were others."""
    kept: KeptTokens
    """The sets, equal on all ranks of tp_group."""


@torch.no_grad()
def truncated_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> TruncatedScores:
    """Find each row's set of likely tokens, and score its target over that set; no gradient.

    One matrix product, in torch on any device. Extra memory: a chunk (on CPUs 40 MiB, or twice
    chunk_tokens * V_local numbers), and the sets. Sends over tp_group an all-gather of 3 C numbers
    a chunk, and one of C * S numbers and C * S ids: S is top_k, or as many as top_p takes, from
    FIRST_CANDIDATES on in powers of 4.

    Args:
        hidden: [N, D], any float dtype, equal on all ranks of tp_group.
        weight: [V_local, D]; rank r holds vocabulary rows r * V_local and on.
        targets: [N] int64 token ids, equal on all ranks.
        top_p: in (0, 1]; 1: no limit.
        top_k: >= 0; 0: no limit.
        temperature, softcap, tp_group, vocab_size: as ``token_log_probs``.
        chunk_tokens: rows per chunk; None: what the memory above allows.

    Returns:
        float32, float64 if an input is float64; equal on all ranks of tp_group.

    Raises:
        ValueError: a shape, dtype, target or setting does not fit; the message names it.
    """
    checks.check_matrices(hidden, weight)
    checks.check_target_shape(targets, hidden, tp_group, False)
    checks.check_settings(temperature, softcap, chunk_tokens)
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"top_p must be in (0, 1] and top_k >= 0, got {top_p} and {top_k}")
    padded = weight.shape[0] * (1 if tp_group is None else tp_group.size())
    vocab_size = padded if vocab_size is None else vocab_size
    checks.check_vocab_size(vocab_size, padded)
    checks.check_targets(targets, vocab_size)
    shard = VocabShard(weight.detach(), vocab_size, tp_group)
    widest = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.float64 if widest == torch.float64 else torch.float32
    budget = BUDGET_BYTES["cpu" if weight.device.type == "cpu" else "cuda"]
    size = chunk_tokens or max(1, budget // (2 * weight.shape[0] * dtype.itemsize))
    numbers = hidden.new_zeros(3, targets.numel(), dtype=dtype)
    is_likely = torch.zeros_like(targets, dtype=torch.bool)
    sets = []
    for start in range(0, targets.numel(), size):
        span = slice(start, start + size)
        z = logits_of(hidden[span].to(dtype) / (softcap or temperature), shard, VOCAB_BLOCK)
        if softcap is not None:
            z.tanh_().mul_(softcap / temperature)
        numbers[:, span], is_likely[span], kept = _one_chunk(z, targets[span], top_p, top_k, shard)
        sets.append(kept)
    log_probs, log_mass, entropy = numbers.unbind()
    kept = KeptTokens.joined(sets, device=targets.device)
    return TruncatedScores(log_probs, log_mass, entropy, is_likely, kept)


def _one_chunk(
    z: Tensor, targets: Tensor, top_p: float, top_k: int, shard: VocabShard
) -> tuple[Tensor, Tensor, KeptTokens]:
    """Find the sets of the logits [C, V].

    Returns [3, C] log-probability, log mass and entropy; which targets are likely [C]; the sets.
    """
    M, S, z_target = merge_partials(gather_partials(_partials(z, targets, shard), shard))
    values, ids, likely = _likeliest(z, M + S.log(), top_p, top_k, shard)
    is_likely = (likely & (ids == targets[:, None])).any(1)
    # One column more: the target, where it is not among them.
    values = torch.cat([values, z_target[:, None]], 1)
    ids = torch.cat([ids, targets[:, None]], 1)
    in_set = torch.cat([likely, ~is_likely[:, None]], 1)
    shifted = (values - M[:, None]).masked_fill_(~in_set, -math.inf)
    log_sum = shifted.logsumexp(1)
    p = (shifted - log_sum[:, None]).exp()
    entropy = log_sum - (p * shifted.masked_fill(~in_set, 0.0)).sum(1)
    numbers = torch.stack([(z_target - M) - log_sum, log_sum - S.log(), entropy])
    kept = KeptTokens(in_set.sum(1, dtype=torch.int32), ids[in_set].int())
    return numbers, is_likely, kept


def _partials(z: Tensor, targets: Tensor, shard: VocabShard) -> Tensor:
    """[3, C] as ``merge_partials`` has it: largest logit, sum of exp, the target's logit or 0."""
    partials = z.new_zeros(3, z.shape[0])
    partials[0] = NO_LOGIT
    if z.shape[1]:
        torch.amax(z, 1, out=partials[0]).clamp_(min=NO_LOGIT)
        partials[1] = (z - partials[0][:, None]).exp_().sum(1)
        place = targets - shard.first
        own = (place >= 0) & (place < z.shape[1])
        found = z.gather(1, place.where(own, 0)[:, None])[:, 0]
        partials[2] = found.where(own, 0.0)
    return partials


def _likeliest(
    z: Tensor, log_sum: Tensor, top_p: float, top_k: int, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and ids of the likeliest tokens, in falling order, and which of them are kept.

    Each [C, R * S], equal on all ranks. Every rank sends its own S likeliest; those of all ranks
    from the largest of the ranks' smallest on are complete. S grows until that is enough.
    """
    V_local = shard.weight.shape[0]
    size = min(top_k or FIRST_CANDIDATES, V_local)
    while True:
        values, ids = _of_all_ranks(z, size, shard)  # [R, S, C]
        floor = values[:, -1].amax(0)[:, None]
        values = values.flatten(0, 1).T
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.flatten(0, 1).T.gather(1, order)
        cumulative = (values - log_sum[:, None]).exp().double().cumsum(1)
        before = torch.nn.functional.pad(cumulative, (1, -1))
        kept = torch.ones_like(values, dtype=torch.bool) if top_p == 1 else before < top_p
        if top_k:
            kept[:, top_k:] = False
        kept[:, 0] = True
        num_kept, num_complete = kept.sum(1), (values >= floor).sum(1)
        ends = (num_kept < num_complete) | ((num_kept == top_k) & (top_k <= num_complete))
        if size == V_local or bool(ends.all()):
            return values, ids, kept & (values > -math.inf)
        size = min(4 * size, V_local)


def _of_all_ranks(z: Tensor, size: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Every rank's ``size`` largest logits, falling, and their token ids: [R, S, C] each.

    -inf where a rank has fewer.
    """
    values = z.new_full((size, z.shape[0]), -math.inf)
    ids = torch.zeros_like(values, dtype=torch.int64)
    held = min(size, z.shape[1])
    if held:
        top = z.topk(held, dim=1)
        values[:held] = top.values.T
        ids[:held] = top.indices.T + shard.first
    return gather_partials(values, shard), gather_partials(ids, shard)
