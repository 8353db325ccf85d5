"""Which fused kernels of Transformer Engine run in the layers, each found by a probe.

Unfused, Megatron rotates the sequences of a pack one by one in about ten kernels each, SwiGLU keeps
two more activations, and each weight gradient is written in 16 bits before it is added.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

from torch import nn

from megatron_rlsd.actor.precision import LayerKind
from megatron_rlsd.config import Fusion, ModelConfig

ENGINE = "megatron.core.extensions.transformer_engine"
PROBES: dict[Fusion, tuple[str, str]] = {
    "rope": (
        "megatron.core.models.common.embeddings.rope_utils",
        "fused_apply_rotary_pos_emb_thd",
    ),
    "activation": (ENGINE, "TEActivationOp"),
    "moe_permute": (ENGINE, "fused_permute"),
    "moe_router": (ENGINE, "fused_topk_with_score_function"),
}
"""Where Megatron keeps what it found of Transformer Engine: None where it found nothing."""


def fusions(
    model: ModelConfig, kind: LayerKind, *, latent: bool, has_experts: bool
) -> dict[Fusion, str | None]:
    """Each fusion, with None where it runs and the reason where it does not."""
    return {name: _reason(name, model, kind, latent, has_experts) for name in get_args(Fusion)}


def _reason(
    name: Fusion, model: ModelConfig, kind: LayerKind, latent: bool, has_experts: bool
) -> str | None:
    if kind == "local":
        return "local layers have no fused kernels"
    if name in model.disabled_fusions:
        return "model.disabled_fusions names it"
    if name == "rope" and latent:
        return "latent attention's rotation has a fused form for YaRN's training alone"
    if name in ("moe_permute", "moe_router") and not has_experts:
        return "the model has no experts"
    if name in PROBES and not (name == "activation" and has_experts):
        module, attribute = PROBES[name]
        if getattr(import_module(module), attribute, None) is None:
            return "this release of Transformer Engine does not have it"
    return None


def fusion_fields(
    model: ModelConfig, kind: LayerKind, *, latent: bool, has_experts: bool
) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig; weight gradients have none, see below."""
    found = fusions(model, kind, latent=latent, has_experts=has_experts)
    runs = {name: reason is None for name, reason in found.items()}
    return {
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": runs["rope"],
        "use_te_activation_func": runs["activation"] and not has_experts,
        # Megatron's own, compiled by torch, which also weighs the experts.
        "bias_activation_fusion": runs["activation"] and has_experts,
        "moe_grouped_gemm": kind == "transformer_engine" and has_experts,
        "moe_permute_fusion": runs["moe_permute"],
        "moe_router_fusion": runs["moe_router"],
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def add_weight_gradients_in_place(chunk: nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to Megatron's float32 ones themselves.

    It is what ``gradient_accumulation_fusion`` does, which Megatron admits only where apex is
    installed, for the sake of an output layer that never runs here: the head takes its weight.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010
