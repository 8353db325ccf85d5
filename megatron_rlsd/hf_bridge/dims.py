"""The sizes of a decoder-only model: its weights are made of them and layouts divide them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rlsd.runtime.errors import UserError

Size = Literal[
    "hidden_size",
    "attention_size",
    "ffn_hidden_size",
    "head_dim",
    "num_experts",
    "expert_ffn_size",
    "shared_expert_ffn_size",
    "q_lora_rank",
    "q_up_size",
    "kv_lora_rank",
    "kv_down_size",
    "kv_up_size",
]


@dataclass(frozen=True)
class ShardLayout:
    """Where a rank stands among those that share the parameters: whose slices it holds.

    Dense parameters are split over tensor parallel (tp). The experts of each layer are dealt out
    over expert parallel (ep) in blocks of equal size, and each expert is split over expert tensor
    parallel (etp).
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1


@dataclass(frozen=True)
class LatentAttentionDims:
    """Sizes of multi-head latent attention (MLA): queries, keys and values through low ranks."""

    q_lora_rank: int | None
    """None: queries are projected in one step."""
    kv_lora_rank: int
    nope_head_dim: int
    """Query and key channels of a head without position encoding."""
    rope_head_dim: int
    """Query channels of a head with position encoding; as many key channels serve all heads."""
    value_head_dim: int


def layers_with_experts(
    num_layers: int, frequency: int | list[int], num_experts: int | None
) -> frozenset[int]:
    """The layers (from 0) whose feed-forward part is a mixture of experts.

    ``frequency`` is Megatron's moe_layer_freq: every n-th layer from the first on, or 0 or 1 for
    each layer.
    """
    if not num_experts:
        return frozenset()
    if isinstance(frequency, int):
        return frozenset(range(0, num_layers, frequency))
    return frozenset(layer for layer, routed in enumerate(frequency) if routed)


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the whole model, before any split over ranks."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    head_dim: int
    """Channels of one head; need not be hidden_size / num_attention_heads. Unused with MLA."""
    ffn_hidden_size: int
    """Width of the feed-forward layers that have no experts."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face checkpoint."""
    padded_vocab_size: int
    """Rows of the embedding in the Megatron model, all tensor-parallel ranks together: vocab_size
    rounded up to their number. The head masks the rows added."""
    tied_embeddings: bool
    """The output layer uses the embedding's weight."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """A norm over the channels of each query and key head; unused with MLA."""
    moe_layers: frozenset[int] = frozenset()
    """0-based numbers of the layers whose feed-forward part is a mixture of experts."""
    num_experts: int = 0
    """Routed experts of each such layer."""
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    """Width of one routed expert."""
    shared_expert_ffn_size: int = 0
    """Width of all shared experts of a layer together; 0: there are none."""
    latent: LatentAttentionDims | None = None
    """Set for MLA only."""
    duplicated_latents: bool = False
    """MLA's down projections are whole on every tensor-parallel rank, as in Transformer Engine's
    layers, instead of split as in Megatron's own."""
    num_mtp_layers: int = 0
    """Layers for multi-token prediction that the checkpoint may hold after the model's own."""

    @property
    def attention_size(self) -> int:
        """Columns of the attention output projection."""
        return self.num_attention_heads * (
            self.latent.value_head_dim if self.latent else self.head_dim
        )

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def q_lora_rank(self) -> int:
        return self._latent.q_lora_rank or 0

    @property
    def q_up_size(self) -> int:
        """Channels of all heads' queries under MLA."""
        return self.num_attention_heads * (self._latent.nope_head_dim + self._latent.rope_head_dim)

    @property
    def kv_lora_rank(self) -> int:
        return self._latent.kv_lora_rank

    @property
    def kv_down_size(self) -> int:
        """The latent and the keys' rope channels, which share one projection under MLA."""
        return self._latent.kv_lora_rank + self._latent.rope_head_dim

    @property
    def kv_up_size(self) -> int:
        """All heads' keys without position encoding and values under MLA."""
        return self.num_attention_heads * (self._latent.nope_head_dim + self._latent.value_head_dim)

    @property
    def _latent(self) -> LatentAttentionDims:
        if self.latent is None:
            raise UserError("a latent attention size was asked of a model without MLA")
        return self.latent

    def size(self, name: Size) -> int:
        return int(getattr(self, name))

    def check(self, layout: ShardLayout) -> None:
        """Raise UserError, with the numbers, where ``layout`` cannot split the sizes."""
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_key_value_heads={self.num_query_groups} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"the model's vocabulary of {self.padded_vocab_size} rows cannot hold the "
                f"checkpoint's vocab_size={self.vocab_size}"
            )
        over_tp = ["num_query_groups", "padded_vocab_size"]
        if len(self.moe_layers) < self.num_layers:
            over_tp.append("ffn_hidden_size")
        if self.shared_expert_ffn_size:
            over_tp.append("shared_expert_ffn_size")
        if self.latent is not None and not self.duplicated_latents:
            over_tp += ["q_lora_rank", "kv_down_size"]
        splits = [("tensor parallel size", layout.tp_size, name) for name in over_tp]
        if self.moe_layers:
            splits += [
                ("expert parallel size", layout.ep_size, "num_experts"),
                ("expert tensor parallel size", layout.etp_size, "expert_ffn_size"),
            ]
        elif layout.ep_size > 1:
            raise UserError(
                f"expert parallel size {layout.ep_size} needs a mixture of experts; "
                "the model has none"
            )
        problems = [
            f"{kind} {ranks} must divide {name}={getattr(self, name)}; "
            f"{getattr(self, name)} mod {ranks} = {getattr(self, name) % ranks}"
            for kind, ranks, name in splits
            if getattr(self, name) % ranks
        ]
        if problems:
            raise UserError("\n".join(problems))
