"""Build this rank's part of a HF config's GPTModel; its last stage ends in a head function."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rlsd.actor.fusions import add_weight_gradients_in_place, fusion_fields
from megatron_rlsd.actor.layers import block_spec
from megatron_rlsd.actor.marks import set_marks
from megatron_rlsd.actor.precision import LayerKind, precision_fields
from megatron_rlsd.actor.routing_replay import RoutingReplay
from megatron_rlsd.actor.userbuffers import overlap_fields
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.hf_bridge import Family
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.rounding import round_up

Head = Callable[[Tensor, Tensor], Any]
"""(hidden [T, D] or, under sequence parallelism, [T / tp, D]; weight [V / tp, D]) -> anything."""


class HeadGPTModel(GPTModel):
    """A GPTModel whose last stage calls a head on hidden states instead of forming logits.

    The head runs inside ``forward``, so that the wrappers around the model (data parallel, 16-bit)
    see its result only and never copy hidden states.
    """

    head: Head | None = None
    routing: RoutingReplay | None = None

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        head: Head | None = None,
        routed_experts: Tensor | None = None,
    ) -> Any:
        """tokens, position_ids [1, T] -> head's result, or hidden states on earlier stages.

        routed_experts [T, layers, experts per token]: replayed by ``routing``.

        Without a head the last stage returns this rank's logits [1, T, V / tp], as GPTModel does.
        """
        self.head = head
        if self.routing is not None:
            self.routing.begin(routed_experts)
        try:
            return super().forward(tokens, position_ids, None, packed_seq_params=packed_seq_params)
        finally:
            self.head = None

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.head is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        # The head takes the weight without calling the layer, whose hooks wait for its gathering
        # (optimizer.overlap_param_gather).
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        return self.head(hidden_states.flatten(0, 1), self.output_weight())

    def output_weight(self) -> Tensor:
        """The head's weight [V / tp, D], shared with the embedding or its own."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    family: Family,
    hf_config: dict[str, Any],
    kind: LayerKind = "local",
) -> TransformerConfig:
    """Megatron's configuration: the family's fields, this layout, this precision."""
    dtype = getattr(torch, model.dtype)
    interleaved = parallel.virtual_pipeline > 1
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": model.recompute_num_layers,
        }
    elif model.recompute == "selective":
        recompute = {
            "recompute_granularity": "selective",
            "recompute_modules": list(model.recompute_modules),
        }
    fields = family.transformer_config_fields(hf_config)
    latent = fields.get("multi_latent_attention", False)
    config_class = MLATransformerConfig if latent else TransformerConfig
    has_experts = bool(fields.get("num_moe_experts"))
    precision = precision_fields(model.precision, kind, has_experts=has_experts)
    return config_class(
        **fields,
        **recompute,
        **precision,
        **overlap_fields(model),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.pipeline_first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.pipeline_last_stage_layers,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype == "bfloat16",
        # Packs differ in length, which Megatron allows with this dispatcher only; between
        # interleaved stages they may not differ (it hangs or crashes).
        variable_seq_lengths=parallel.pipeline > 1 and not interleaved,
        **dispatcher_fields(parallel),
        # Our loss carries its own normaliser; gradients are summed, never averaged.
        calculate_per_token_loss=True,
        # Every parameter is filled from a checkpoint, which the loader proves. Initialisation must
        # still run: it marks which parameters are split over tensor-parallel ranks, and without the
        # marks the gradient norm silently misses all shards but the first.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        # Over gloo batched or overlapped point-to-point calls give wrong gradients between
        # interleaved stages; over NCCL those are overlapped, and others batched, as usual.
        batch_p2p_comm=torch.cuda.is_available() and not interleaved,
        overlap_p2p_comm=torch.cuda.is_available() and interleaved,
        **fusion_fields(model, kind, latent=latent, has_experts=has_experts),
    )


def dispatcher_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """How tokens are sent to experts; UserError where DeepEP was asked for and is not here."""
    if parallel.dispatcher == "alltoall":
        return {"moe_token_dispatcher_type": "alltoall"}
    if find_spec("deep_ep") is None:
        raise UserError("parallel.dispatcher=deepep: the package deep_ep is not installed")
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}


def _leave_unset(weight: Tensor) -> Tensor:
    return weight


def build_model(
    config: TransformerConfig,
    family: Family,
    hf_config: dict[str, Any],
    groups: ParallelGroups,
    kind: LayerKind = "local",
    *,
    gradients_in_place: bool = False,
) -> list[HeadGPTModel]:
    """This rank's model chunks (one, unless pipeline stages are interleaved), weights unset.

    ``gradients_in_place``: see ``fusions``; Megatron's data-parallel wrapper must then give the
    parameters float32 gradients.
    """
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for number in range(num_chunks):
        vp_stage = number if num_chunks > 1 else None
        chunk = HeadGPTModel(
            config,
            block_spec(config, kind, vp_stage),
            pre_process=groups.is_first_stage and number == 0,
            post_process=groups.is_last_stage and number == num_chunks - 1,
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
            **family.model_fields(hf_config)
            | {"vocab_size": round_up(hf_config["vocab_size"], config.tensor_model_parallel_size)},
        )
        if gradients_in_place:
            add_weight_gradients_in_place(chunk)
        chunks.append(chunk.to(groups.device))
    set_marks(chunks, family, hf_config, config, groups)
    return chunks
