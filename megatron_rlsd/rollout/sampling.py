"""Drawing one token per row of logits: temperature, top-k, top-p, inverse CDF.

Shapes: N rows, V vocabulary.

Every row draws with its own number, so a token depends on its own logits, parameters and seed
alone, never on the rows that happen to be decoded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rlsd.types import SamplingParams

BLOCK_TOKENS = 128


def request_uniforms(seed: int, count: int) -> list[float]:
    """The numbers in [0, 1) that decide the ``count`` tokens of a request, one per position.

    A longer list begins with the shorter one, so max_new_tokens does not change the tokens.
    """
    # torch's CPU generator ignores all but the low 32 bits of its seed; the high ones are mixed in
    # so that, say, (step << 32) + index gives other numbers at every step.
    folded = (seed + 0x9E3779B1 * (seed >> 32)) & 0xFFFFFFFF
    generator = torch.Generator().manual_seed(folded)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of N rows as tensors, built anew only when the rows change."""

    temperature: torch.Tensor
    """[N, 1] float32; 1 for greedy rows."""
    greedy: torch.Tensor
    """[N] bool."""
    any_greedy: bool
    all_greedy: bool
    filtered_rows: torch.Tensor | None
    """[M] int64, the rows with a top-k or top-p; None when there are none."""
    top_k: torch.Tensor
    """[M, 1] int64; a row without top-k has the largest integer."""
    top_p: torch.Tensor
    """[M, 1] float64."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> RowParams:
        greedy = [p.temperature == 0 for p in params]
        filtered = [
            i for i, p in enumerate(params) if not greedy[i] and (p.top_k > 0 or p.top_p < 1)
        ]
        no_limit = torch.iinfo(torch.int64).max

        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return cls(
            temperature=column([p.temperature or 1.0 for p in params], torch.float32),
            greedy=torch.tensor(greedy, device=device),
            any_greedy=any(greedy),
            all_greedy=all(greedy),
            filtered_rows=torch.tensor(filtered, device=device) if filtered else None,
            top_k=column([params[i].top_k or no_limit for i in filtered], torch.int64),
            top_p=column([params[i].top_p for i in filtered], torch.float64),
        )


def sample_tokens(
    logits: torch.Tensor, params: RowParams, uniforms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row and report its log-probability over the whole vocabulary.

    logits: [N, V], any float dtype. uniforms: N numbers in [0, 1).
    Returns tokens [N] int64 and log_softmax(logits / temperature)[token] [N] float32, which top-k
    and top-p do not renormalise; greedy rows take the first largest logit, at temperature 1.
    """
    log_probs = torch.log_softmax(logits.float() / params.temperature, dim=-1)
    if params.all_greedy:
        tokens = log_probs.argmax(dim=-1)
    else:
        tokens = _inverse_cdf(log_probs, params, uniforms)
        if params.any_greedy:
            tokens = torch.where(params.greedy, log_probs.argmax(dim=-1), tokens)
    return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _inverse_cdf(
    log_probs: torch.Tensor, params: RowParams, uniforms: Sequence[float]
) -> torch.Tensor:
    """The first token [N], in order of ids, whose cumulative probability exceeds the uniform."""
    probs = log_probs.exp()
    if params.filtered_rows is not None:
        candidates = probs[params.filtered_rows]
        kept = support(candidates, params.top_k, params.top_p)
        probs[params.filtered_rows] = candidates.where(kept, 0.0)
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=probs.device).unsqueeze(1)
    # First the block of tokens, then the token in it: cumulative sums are serial, and that over
    # the vocabulary would cost more than the rest of the sampling.
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK_TOKENS)).unflatten(1, (-1, BLOCK_TOKENS))
    block, uniform_in_block = _draw(blocks.sum(dim=-1), uniform)
    rows = torch.arange(probs.shape[0], device=probs.device)
    offset, _ = _draw(blocks[rows, block.squeeze(1)], uniform_in_block)
    # A row of NaN has no such token and may point into the padding.
    return (block * BLOCK_TOKENS + offset).squeeze(1).clamp(max=probs.shape[1] - 1)


def _draw(mass: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose from K outcomes of unnormalised mass; never one of mass 0.

    mass: [N, K] float; uniform: [N, 1] float64 in [0, 1).
    Returns the outcome [N, 1] int64 and how far into its mass the uniform points, [N, 1] in
    [0, 1]: that again is uniform, and decides within the outcome.
    """
    # Double precision keeps the boundaries between tokens in place whatever the batch shape.
    cdf = mass.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    # Strictly below the total, or rounding could select an outcome of mass 0 at the end.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    outcome = torch.searchsorted(cdf, target, right=True).clamp(max=mass.shape[1] - 1)
    outcome_mass = mass.gather(1, outcome).double()
    before = cdf.gather(1, outcome) - outcome_mass
    return outcome, ((target - before) / outcome_mass).clamp(0.0, 1.0)


def support(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[N, V] bool: the tokens that may be drawn.

    The top_k most likely ones (of equal ones the lowest ids), and of these the fewest whose share
    of the whole mass reaches top_p, as SGLang has it; always at least one.
    probs: [N, V]; top_k: [N, 1] int64; top_p: [N, 1] float64.
    """
    ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered = ordered.double()
    cumulative = ordered.cumsum(dim=-1)
    mass_before = cumulative - ordered
    kept = (rank < top_k) & ((mass_before < top_p * cumulative[:, -1:]) | (rank == 0))
    return torch.zeros_like(kept).scatter(1, order, kept)
