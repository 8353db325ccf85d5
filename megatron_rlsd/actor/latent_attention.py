"""Multi-head latent attention (MLA) whose gradients are right under tensor parallelism.

S tokens of the sequence, B batch, C the latent's and the rope keys' channels together.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn


class LatentAttention(MLASelfAttention):
    """Megatron's MLA for the local spec.

    The rope keys are computed once, split over the tensor-parallel ranks, and serve the heads of
    all of them. Megatron gathers the keys but never sums what each rank's heads send back, so
    their projection would train on a part of its gradient. Gathered here, right behind the
    projection, they take Megatron's other path, the one of Transformer Engine's layers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pg_collection.tp.size() == 1:
            return
        if not self.config.sequence_parallel:
            raise ValueError("latent attention needs sequence parallelism with tensor parallelism")
        self.linear_kv_down_proj.register_forward_hook(self._gather)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What to build, as the spec says (asked by 0.19, not by 0.16).

        Megatron's own answer norms the queries also where they have no latent.
        """
        names = (
            "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm"
        )  # fmt: skip
        return {name: getattr(submodules, name) for name in names}

    def _gather(
        self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, C / tp] -> [S / tp, B, C]; gathering the keys from that sums their gradients."""
        columns, bias = output
        group = self.pg_collection.tp
        whole = gather_from_tensor_model_parallel_region(columns, group=group)
        return scatter_to_sequence_parallel_region(whole, group=group), bias
