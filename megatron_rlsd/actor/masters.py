"""8-bit parameters and the float32 masters that they are made from.

The masters are the weights: they start from the values that were loaded, not from their rounding,
and the parameters are made of them by one function, Megatron's own after each optimizer step
(``cast_master_weights_to_fp8`` of Transformer Engine, then a gathering over data-parallel ranks).
It is called as well at the start and after a checkpoint was read, so that equal masters always give
the same parameters. Parameters that are stored plainly are none of this module's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_rlsd.hf_bridge.quantized import is_quantized, stored, unrounded
from megatron_rlsd.runtime.errors import UserError

Exact = Mapping[Tensor, Tensor]
"""8-bit parameter -> all of its values before they were rounded, on any device."""


def loaded_values(parameters: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """What was loaded into the 8-bit parameters among these; before an optimizer is made of them.

    Raises UserError where Transformer Engine has not kept it: masters would then start from
    rounded weights.
    """
    exact: dict[Tensor, Tensor] = {}
    for name, parameter in parameters.items():
        if not is_quantized(parameter):
            continue
        kept = unrounded(parameter)
        if kept is None:
            raise UserError(
                f"parameter {name} is in 8 bits and its values before rounding were not kept; "
                "model.precision.fp8_parameters needs a Transformer Engine whose fp8_model_init "
                "has preserve_high_precision_init_val"
            )
        exact[parameter] = kept
    return exact


def forget_loaded_values(parameters: Iterable[Tensor]) -> None:
    """Free what is kept for masters that will not be made."""
    for parameter in parameters:
        if is_quantized(parameter) and unrounded(parameter) is not None:
            stored(parameter).clear_high_precision_init_val()


@torch.no_grad()
def set_masters(optimizer: MegatronOptimizer, exact: Exact) -> None:
    """Give the masters of these parameters, as far as this rank holds them, the exact values."""
    for part in _parts(optimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            if parameter in exact:
                held = part._get_model_param_range_map(parameter)["param"]
                master = part.optimizer.param_groups[group]["params"][order]
                master.copy_(exact[parameter].reshape(-1)[held.start : held.end])


def remake_parameters(optimizer: MegatronOptimizer, model: Sequence[Any]) -> None:
    """Make all parameters of the masters, as an optimizer step does. Collective."""
    for part in _parts(optimizer):
        part._copy_main_params_to_model_params()
    for chunk in model:
        chunk.start_param_sync(force_sync=True)


def optimizer_parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The optimizers that Megatron chains (experts have their own), without those that hold no
    parameters on this rank."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            yield part


def _parts(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in optimizer_parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            raise TypeError(f"8-bit parameters with {type(part).__name__}: no masters of them")
        yield part
