"""What 8-bit parameters and overlapped tensor parallelism ask of the other sections."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_rlsd.config.model import ParallelConfig, PrecisionConfig
from megatron_rlsd.config.training import OptimizerConfig


def fp8_parameter_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """A sentence for each setting that does not go with precision.fp8_parameters."""
    if not optimizer.distributed:
        yield (
            "model.precision.fp8_parameters=true needs optimizer.distributed=true: only Megatron's "
            "distributed optimizer makes 8-bit weights from float32 masters"
        )
    if optimizer.overlap_param_gather:
        yield (
            "model.precision.fp8_parameters=true does not go with "
            "optimizer.overlap_param_gather=true: Megatron-Core 0.16 does not renew the transposed "
            "8-bit weights when they are gathered at once after the last update of a rollout"
        )


def tp_overlap_problems(
    parallel: ParallelConfig, precision: PrecisionConfig, *, tokens: int, longest: int
) -> Iterator[str]:
    """A sentence for each setting that does not go with model.tp_comm_overlap.

    Args:
        tokens: train.max_tokens_per_microbatch, which every micro-batch then has.
        longest: tokens of the longest sequence that the settings allow.
    """
    if not parallel.sequence:
        yield (
            f"model.tp_comm_overlap=true needs parallel.sequence=true (and so parallel.tensor > 1),"
            f" got parallel.tensor={parallel.tensor}, parallel.sequence=false: what overlaps is "
            "gathering and scattering of activations that are split over the sequence"
        )
        return
    # Each of a ring's products is over the tokens of one tensor-parallel rank.
    multiple = math.lcm(
        parallel.pack_multiple, precision.token_multiple * parallel.context * parallel.tensor
    )
    if tokens % multiple:
        yield (
            f"model.tp_comm_overlap=true pads every micro-batch to "
            f"train.max_tokens_per_microbatch={tokens}, which must be a multiple of {multiple} in "
            "this layout"
        )
    if longest > tokens:
        yield (
            f"model.tp_comm_overlap=true needs train.max_tokens_per_microbatch >= {longest}, the "
            f"longest prompt, hint and response together, got {tokens}: its buffers have one "
            "length, and a longer sequence fits no micro-batch"
        )
