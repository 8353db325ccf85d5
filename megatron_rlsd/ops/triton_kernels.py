"""The three Triton kernels of the fused head; ``triton_launch`` calls them.

Shapes: C rows of a chunk, V vocabulary rows of this rank that are not padding, D hidden size, B
vocabulary blocks of BLOCK_V rows. C, V and D need be no multiple of anything.

The product kernel never writes a logit. It writes E = exp(z - m_b), with m_b the row's largest
logit of one vocabulary block, in the dtype of the inputs: E lies in [0, 1], so that rounding it to
bfloat16 costs a relative 2^-9 wherever the row's logits lie, while a bfloat16 logit would be wrong
by 2^-9 of its own size. Nothing has to be known about a row before its product starts, and nothing
can overflow. The merge kernel joins the blocks' sums. The last kernel, which needs the row's
softmax over all ranks, turns E into dz in place: reading and writing E once more is all it costs.

All arithmetic is float32 from float32 accumulators.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations as types of its own.

from __future__ import annotations

import triton
import triton.language as tl

NO_LOGIT = tl.constexpr(-1e30)
"""Largest logit of a block that has none; finite, so that a difference of two is not NaN."""


@triton.jit
def product_kernel(
    hidden,
    weight,
    exp_out,
    target_ids,
    partials,
    C,
    V,
    D,
    hidden_stride,
    weight_stride,
    exp_stride,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
    PROGRAMS_PER_SM: tl.constexpr,  # read by the launch grid alone
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """z = softcap tanh(hidden weight^T / softcap) scale, and its softmax sums by vocabulary block.

    A persistent grid: each program takes every num_programs-th tile [BLOCK_C, TILE_V] of the [C, V]
    logits, TILE_V being one vocabulary block or two. Tiles run down GROUP_C row blocks before they
    move to the next vocabulary tile, so that the tiles in work at one time share both their rows
    and their vocabulary rows in the L2 cache.

    Args:
        hidden: [C, D], weight: [V, D], exp_out: [C, V] in rows of exp_stride, or None where E is
            not wanted. All of one float dtype. With DESCRIPTORS tensor descriptors of blocks
            [BLOCK_C, BLOCK_D], [TILE_V, BLOCK_D] and [BLOCK_C, BLOCK_V], else pointers.
        target_ids: [C] int32 counted from this rank's first row; -1 where another rank holds it.
        partials: [B, K, C] float32, of each block what ``collectives.merge_partials`` takes: m_b,
            sum exp(z - m_b), the target's logit (0 in other blocks) and with entropy (K = 4)
            sum exp(z - m_b) (z - m_b).
        scale: 1 / temperature.
        WIDEN: convert tiles to float32 first; the interpreter multiplies bfloat16 bits as integers.
        softcap: None: no cap.
    """
    row_blocks = tl.cdiv(C, BLOCK_C)
    vocab_tiles = tl.cdiv(V, TILE_V)
    tiles = row_blocks * vocab_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        first_row_block = tile // (GROUP_C * vocab_tiles) * GROUP_C
        group_rows = tl.minimum(row_blocks - first_row_block, GROUP_C)
        tile_in_group = tile - first_row_block * vocab_tiles
        row_block = first_row_block + tile_in_group % group_rows
        vocab_tile = tile_in_group // group_rows
        rows = row_block * BLOCK_C + tl.arange(0, BLOCK_C)

        z = tl.zeros((BLOCK_C, TILE_V), dtype=tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            if DESCRIPTORS:
                hidden_tile = hidden.load([row_block * BLOCK_C, d])
                weight_tile = weight.load([vocab_tile * TILE_V, d])
            else:
                # Rows beyond the end are read as the last one, and left out below.
                ids = vocab_tile * TILE_V + tl.arange(0, TILE_V)
                h_rows = tl.minimum(rows, C - 1).to(tl.int64)[:, None] * hidden_stride
                w_rows = tl.minimum(ids, V - 1).to(tl.int64)[:, None] * weight_stride
                columns = d + tl.arange(0, BLOCK_D)[None, :]
                inside = columns < D
                hidden_tile = tl.load(hidden + h_rows + columns, mask=inside, other=0.0)
                weight_tile = tl.load(weight + w_rows + columns, mask=inside, other=0.0)
            if WIDEN:
                hidden_tile, weight_tile = hidden_tile.to(tl.float32), weight_tile.to(tl.float32)
            z = tl.dot(hidden_tile, weight_tile.T, z, input_precision=INPUT_PRECISION)

        if TILE_V == BLOCK_V:
            _leave_sums(
                z, exp_out, target_ids, partials, C, V, exp_stride, scale, softcap,
                row_block, vocab_tile, BLOCK_C, BLOCK_V, DESCRIPTORS, WITH_ENTROPY,
            )  # fmt: skip
        else:
            # Half of the accumulator at a time, whose other half waits in registers.
            tl.static_assert(TILE_V == 2 * BLOCK_V)
            halves = tl.permute(tl.reshape(z, (BLOCK_C, 2, BLOCK_V)), (0, 2, 1))
            first, second = tl.split(halves)
            _leave_sums(
                first, exp_out, target_ids, partials, C, V, exp_stride, scale, softcap,
                row_block, 2 * vocab_tile, BLOCK_C, BLOCK_V, DESCRIPTORS, WITH_ENTROPY,
            )  # fmt: skip
            _leave_sums(
                second, exp_out, target_ids, partials, C, V, exp_stride, scale, softcap,
                row_block, 2 * vocab_tile + 1, BLOCK_C, BLOCK_V, DESCRIPTORS, WITH_ENTROPY,
            )  # fmt: skip


@triton.jit
def _leave_sums(
    z,
    exp_out,
    target_ids,
    partials,
    C,
    V,
    exp_stride,
    scale,
    softcap,
    row_block,
    vocab_block,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Products h . w [BLOCK_C, BLOCK_V] of one vocabulary block -> its partials and its part of E.

    A vocabulary block from V on leaves nothing.
    """
    rows = row_block * BLOCK_C + tl.arange(0, BLOCK_C)
    ids = vocab_block * BLOCK_V + tl.arange(0, BLOCK_V)
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    z = tl.where(ids[None, :] < V, z * scale, -float("inf"))
    m = tl.maximum(tl.max(z, axis=1), NO_LOGIT)
    shifted = z - m[:, None]
    exp = tl.exp(shifted)
    row_inside = rows < tl.where(vocab_block * BLOCK_V < V, C, 0)
    target = tl.load(target_ids + rows, mask=row_inside, other=-1)
    target_logit = tl.sum(tl.where(ids[None, :] == target[:, None], z, 0.0), axis=1)
    sums = partials + vocab_block.to(tl.int64) * (4 if WITH_ENTROPY else 3) * C + rows
    tl.store(sums, m, mask=row_inside)
    tl.store(sums + C, tl.sum(exp, axis=1), mask=row_inside)
    tl.store(sums + 2 * C, target_logit, mask=row_inside)
    if WITH_ENTROPY:
        # A logit of -inf adds nothing; as a product it would be 0 * -inf.
        moment = tl.sum(tl.where(exp > 0, exp * shifted, 0.0), axis=1)
        tl.store(sums + 3 * C, moment, mask=row_inside)
    if exp_out is not None:
        if DESCRIPTORS:
            exp_out.store([row_block * BLOCK_C, vocab_block * BLOCK_V], exp.to(exp_out.dtype))
        else:
            at = rows.to(tl.int64)[:, None] * exp_stride + ids[None, :]
            # The row's padding is written too: a multiple of 16 lets the stores be wide.
            inside = row_inside[:, None] & (ids[None, :] < exp_stride)
            tl.store(exp_out + at, exp.to(exp_out.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    partials, merged, B, C, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``collectives.merge_partials`` in one pass: partials [B, K, C] -> merged [K, C], float32.

    One program for BLOCK_C rows goes through all vocabulary blocks, BLOCK_B at a time, and rescales
    its sums whenever their largest logit grows.
    """
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    M = tl.full((BLOCK_C,), NO_LOGIT, dtype=tl.float32)
    S = tl.zeros((BLOCK_C,), dtype=tl.float32)
    target = tl.zeros((BLOCK_C,), dtype=tl.float32)
    U = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in tl.range(0, B, BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)
        inside = (blocks[:, None] < B) & (rows[None, :] < C)
        at = partials + blocks.to(tl.int64)[:, None] * (K * C) + rows[None, :]
        m = tl.load(at, mask=inside, other=NO_LOGIT)
        s = tl.load(at + C, mask=inside, other=0.0)
        target += tl.sum(tl.load(at + 2 * C, mask=inside, other=0.0), axis=0)
        largest = tl.maximum(M, tl.max(m, axis=0))
        shift = tl.exp(m - largest[None, :])
        shrink = tl.exp(M - largest)
        if K == 4:
            u = tl.load(at + 3 * C, mask=inside, other=0.0)
            moved = (u + (m - largest[None, :]) * s) * shift
            U = (U + (M - largest) * S) * shrink + tl.sum(moved, axis=0)
        S = S * shrink + tl.sum(s * shift, axis=0)
        M = largest
    inside_C = rows < C
    tl.store(merged + rows, M, mask=inside_C)
    tl.store(merged + C + rows, S, mask=inside_C)
    tl.store(merged + 2 * C + rows, target, mask=inside_C)
    if K == 4:
        tl.store(merged + 3 * C + rows, U, mask=inside_C)


@triton.jit
def exp_to_gradient_kernel(
    exp_inout,
    partials,
    target_ids,
    log_probs,
    max_logits,
    log_sums,
    d_log_probs,
    d_entropies,
    entropies,
    gain,
    C,
    V,
    exp_stride,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
):
    """E = exp(z - m_b) -> d loss / d (hidden weight^T), in place; one row and BLOCKS blocks each.

        p  = E exp(m_b - logsumexp)
        dz = g (onehot - p) - e p (log p + H)
        d  = dz scale (1 - tanh^2) gain

    The target's own p is that of the softmax, which was never rounded. With a softcap c, tanh comes
    from log E, so that the rounding of E shows where tanh is nearly 1: in bfloat16 1 - tanh^2 is
    wrong by 2^-8 / c, 1e-4 at c = 30.

    Args:
        exp_inout: [C, V] in rows of exp_stride. partials: [B, K, C] as in product_kernel.
        target_ids: [C] int32 as in product_kernel.
        log_probs, max_logits, log_sums: [C] float32 of the softmax over all ranks (LogSoftmax).
        d_log_probs: [C] float32, g.
        d_entropies, entropies: [C] float32, e and H, or None.
        gain: [1] float32 factor that keeps float16 from underflow, or None.
    """
    programs_per_row = tl.cdiv(V, BLOCKS * BLOCK_V)
    row = tl.program_id(0) // programs_per_row
    blocks = tl.program_id(0) % programs_per_row * BLOCKS + tl.arange(0, BLOCKS)
    ids = blocks[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    inside = ids < exp_stride  # with the padding, so that loads and stores are wide
    at = exp_inout + row.to(tl.int64) * exp_stride + ids
    exp = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    m_at = partials + blocks.to(tl.int64) * K * C + row
    m = tl.load(m_at, mask=blocks * BLOCK_V < V, other=NO_LOGIT)
    max_logit = tl.load(max_logits + row)
    log_sum = tl.load(log_sums + row)
    log_prob = tl.load(log_probs + row)
    g = tl.load(d_log_probs + row)
    is_target = ids == tl.load(target_ids + row)

    log_shift = ((m - max_logit) - log_sum)[:, None]
    p = tl.where(is_target, tl.exp(log_prob), exp * tl.exp(log_shift))
    d = tl.where(is_target, g - g * p, -g * p)
    if entropies is not None:
        log_p = tl.where(is_target, log_prob, tl.log(exp) + log_shift)
        e = tl.load(d_entropies + row)
        d -= tl.where(p > 0, e * p * (log_p + tl.load(entropies + row)), 0.0)
    if softcap is not None:
        z = tl.where(is_target, log_prob + log_sum + max_logit, tl.log(exp) + m[:, None])
        tanh = z / (scale * softcap)
        slope = tl.maximum(1 - tanh * tanh, 0.0)
        d = tl.where(is_target | (exp > 0), d * slope, 0.0)
    d *= scale
    if gain is not None:
        d *= tl.load(gain)
    tl.store(at, d.to(exp_inout.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """From exp alone, which the interpreter has too; exp overflows to inf, and 2 / inf is 0."""
    return 1 - 2 / (tl.exp(2 * x) + 1)
