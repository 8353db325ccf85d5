"""Layers for the local spec where Megatron's own need CUDA: RMSNorm, packed attention.

Shapes: S sequence (packed: T tokens), B batch, N heads of this rank, G KV heads of this rank,
H head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over tensor-parallel ranks under sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism; the mark is all it takes.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


class PackedAttention(MegatronModule):
    """Causal core attention on scaled_dot_product_attention, one call per packed sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """query [T, N, H], key and value [T, G, H] with packed_seq_params -> [T, N * H]...

        or [S, B, N, H] and [S, B, G, H] without -> [S, B, N * H].
        """
        if packed_seq_params is None:
            # [S, B, N, H] -> [B, N, S, H] and back
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        pieces = [
            # [T_i, N, H] -> [1, N, T_i, H] and back
            self._attend(*(x[a:b].transpose(0, 1)[None] for x in (query, key, value)))[0]
            for a, b in pairwise(bounds)
            if b > a
        ]
        return torch.cat([piece.transpose(0, 1) for piece in pieces])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )


def local_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with the layers above in place of those that need CUDA."""
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer_spec(config) for _ in range(get_num_layers_to_build(config))],
        layer_norm=RMSNorm,
    )


def _local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return spec
