"""Layers for the local spec where Megatron's own need CUDA: RMSNorm, packed attention.

Shapes: S sequence (packed: T tokens), B batch, N heads of this rank, G KV heads of this rank,
H head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_rlsd.actor.context_parallel import gather_pack, held_chunks
from megatron_rlsd.actor.latent_attention import LatentAttention
from megatron_rlsd.actor.packing import PackBounds
from megatron_rlsd.actor.precision import LayerKind
from megatron_rlsd.hf_bridge.dims import layers_with_experts


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
    """Causal core attention on scaled_dot_product_attention, one call per chunk of a sequence.

    With context parallelism the queries stay where they are and meet the keys and values of the
    whole pack, gathered over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackBounds | None = None,
        **_: Any,
    ) -> Tensor:
        """query [T, N, H], key and value [T, G, H] with packed_seq_params -> [T, N, H]...

        or [S, B, N, H] and [S, B, G, H] without -> [S, B, N * H].
        """
        cp_rank, cp_size = 0, 1
        if self.cp_group is not None:
            cp_rank, cp_size = self.cp_group.rank(), self.cp_group.size()
        if packed_seq_params is None:
            if cp_size > 1:
                raise ValueError("context parallelism needs packed sequences")
            # [S, B, N, H] -> [B, N, S, H] and back
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.bounds
        if self.cp_group is not None:
            both = gather_pack(torch.cat([key, value], dim=-1), bounds, self.cp_group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        # [T, N, H] -> [N, T, H]
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        pieces, done = [], 0
        for start, end in pairwise(bounds):
            for first, last in held_chunks(start, end, cp_rank, cp_size):
                queries = query[:, done : done + last - first]
                pieces.append(self._attend(queries, key[:, start:last], value[:, start:last]))
                done += last - first
        return torch.cat(pieces, dim=1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries [..., N, Q, H] are the last of the keys [..., G, K, H]."""
        queries, keys = query.shape[-2], key.shape[-2]
        mask = None
        if queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries)
        if squeeze := query.ndim == 3:
            query, key, value = query[None], key[None], value[None]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out[0] if squeeze else out


def block_spec(
    config: TransformerConfig, kind: LayerKind, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """This rank's layers: Transformer Engine's, or Megatron's local ones with the layers above in
    place of those that need CUDA.

    ``vp_stage``: the model chunk on this rank, where pipeline stages are interleaved.
    """
    offset = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    routed = layers_with_experts(config.num_layers, config.moe_layer_freq, config.num_moe_experts)
    layer_spec, norm = _local_layer_spec, RMSNorm
    if kind == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer_spec, norm = _engine_layer_spec, TENorm
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, layer in routed) for layer in range(offset, offset + count)
        ],
        layer_norm=norm,
    )


def _engine_layer_spec(config: TransformerConfig, with_experts: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if with_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        use_te_activation_func=config.use_te_activation_func,
    )


def _local_layer_spec(config: TransformerConfig, with_experts: bool) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if with_experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        if config.multi_latent_attention:
            layer.self_attention.module = LatentAttention
            attention.kv_layernorm = RMSNorm
        else:
            attention.k_layernorm = RMSNorm
    return spec
