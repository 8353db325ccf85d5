"""Bytes that a forward pass keeps for its backward pass, layer by layer.

Counted from what each operation of a layer saves, and compared with what autograd really keeps: of
local layers on CPUs in tests/distributed/test_activation_bytes.py, on a GPU, with Transformer
Engine's layers too, in tests/gpu/test_gpu_planned_memory.py (dense layers).

T tokens of the pack on this rank, S of them where sequence parallelism splits them, D hidden size,
N heads and G key/value heads of this rank, H head size, F feed-forward rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rlsd.config import Fusion, ModelConfig, ParallelConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.eight_bit import eight_bit_layers
from megatron_rlsd.parallel.layout import layers_of_stage

Kernels = Literal["cpu", "cuda", "transformer_engine"]
"""Whose kernels run: torch's on a CPU or a GPU, in Megatron's local layers; or Transformer
Engine's layers."""
FLOAT32 = 4
INT64 = 8
PACK_COLUMNS = 6
"""The columns of actor.packing's table."""


@dataclass(frozen=True)
class Pack:
    """One micro-batch: the padded lengths of its sequences, all context-parallel ranks together."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        """Query-key pairs of all sequences, masked ones included."""
        return sum(length * length for length in self.lengths)

    @classmethod
    def of(cls, tokens: int, longest: int) -> Pack:
        """A full pack of sequences as long as they can be, and one of what is left."""
        longest = min(tokens, longest)
        whole, rest = divmod(tokens, longest)
        return cls((longest,) * whole + ((rest,) if rest else ()))


@dataclass(frozen=True)
class LayerBytes:
    """The bytes of one layer on one rank."""

    kept: int
    """From its forward pass to its backward pass."""
    recomputed: int
    """More while its backward pass runs: what is computed a second time."""


class ActivationCounter:
    """Counts for one model, layout, precision and pack."""

    def __init__(
        self,
        model: ModelDims,
        parallel: ParallelConfig,
        settings: ModelConfig,
        pack: Pack,
        kernels: Kernels,
    ) -> None:
        self._model, self._parallel, self._settings = model, parallel, settings
        self._kernels = kernels
        self._pack = pack
        self.tp = parallel.tensor
        self.item = 2 if settings.dtype == "bfloat16" else 4
        self.tokens = pack.tokens // parallel.context
        self.split_tokens = self.tokens // self.tp if parallel.sequence else self.tokens
        self._eight_bit_layers = eight_bit_layers(
            settings.precision, model.num_layers, range(model.num_layers)
        )

    def layer(self, number: int) -> LayerBytes:
        """The bytes of layer ``number`` (from 0), without recompute of whole layers."""
        has_experts = number in self._model.moe_layers
        modules = (
            self._settings.recompute_modules if self._settings.recompute == "selective" else []
        )
        attention = self._attention_inputs() + self._core_attention()
        feed_forward = self._experts() if has_experts else self._dense()
        norms = 2 * (self._norm(self.split_tokens) + self.residual)
        kept, recomputed = 0, 0
        if "layernorm" in modules:
            kept += 2 * self.residual
            recomputed += norms // 2
        else:
            kept += norms
        if "core_attn" in modules:
            kept += self._attention_inputs() + self._core_attention_inputs()
            recomputed += self._core_attention()
        else:
            kept += attention
        if ("moe" if has_experts else "mlp") in modules:
            recomputed += feed_forward
        else:
            kept += feed_forward
        if not modules and number in self._eight_bit_layers:
            kept -= self._less_in_eight_bits(has_experts)
        return LayerBytes(kept, recomputed)

    def stage(self, stage: int) -> LayerBytes:
        """The bytes of all layers of a pipeline stage for one micro-batch, without the head."""
        layers = layers_of_stage(self._parallel, self._model.num_layers, stage)
        each = [self.layer(number) for number in layers]
        if self._settings.recompute == "full":
            unit = self._settings.recompute_num_layers
            units = [each[i : i + unit] for i in range(0, len(each), unit)]
            kept = len(units) * self.residual
            kept += self._rotary_table()
            recomputed = max((sum(layer.kept for layer in unit) for unit in units), default=0)
        else:
            kept = sum(layer.kept for layer in each)
            recomputed = max((layer.recomputed for layer in each), default=0)
            if self._rotates_fused:
                kept += self._rotary_table()
        if stage == 0:
            # Token ids: whole rows of the pack's table, or a copy and a mask of those of this rank.
            kept += self.tokens * (INT64 + 1 if self.tp > 1 else PACK_COLUMNS * INT64)
        if stage == self._parallel.pipeline - 1:
            kept += self._norm(self.split_tokens)
        return LayerBytes(kept, recomputed)

    def forward_layer(self) -> int:
        """The most that one layer's forward pass holds where nothing is kept for backward."""
        return self.residual + self.widest() // 2 + self._core_attention()

    @property
    def residual(self) -> int:
        """Hidden states as layers hand them on, [S, D]."""
        return self.item * self.split_tokens * self._model.hidden_size

    def widest(self) -> int:
        """The largest of the tensors that backward makes and drops: gradients around one layer."""
        model = self._model
        rows = self.item * self.tokens
        dense = 3 * model.ffn_hidden_size if len(model.moe_layers) < model.num_layers else 0
        shared = 3 * model.shared_expert_ffn_size
        widths = [max(dense, shared) // self.tp, (self._queries + 2 * self._keys)]
        routed = 0
        if model.moe_layers:
            routed = self.item * self._routed_rows() * (2 * model.hidden_size)
        # Two of the residual's size: its gradient, and the one that a linear layer adds to it.
        return max(*(rows * w for w in widths), routed) + 2 * rows * model.hidden_size

    def _norm(self, rows: int, width: int | None = None) -> int:
        """What a norm keeps of its input [rows, width]; its output is counted by who uses it."""
        width = self._model.hidden_size if width is None else width
        if self._kernels == "cpu":
            # Torch composes it: the input and the normalised input, both in float32.
            return rows * (2 * FLOAT32 * width + FLOAT32)
        return rows * (self.item * width + FLOAT32)

    @property
    def _queries(self) -> int:
        """Channels of all queries of this rank."""
        latent = self._model.latent
        size = latent.nope_head_dim + latent.rope_head_dim if latent else self._model.head_dim
        return self._model.num_attention_heads * size // self.tp

    @property
    def _keys(self) -> int:
        if self._model.latent:
            return self._queries
        return self._model.num_query_groups * self._model.head_dim // self.tp

    @property
    def _values(self) -> int:
        latent = self._model.latent
        if latent:
            return self._model.num_attention_heads * latent.value_head_dim // self.tp
        return self._keys

    @property
    def _rotary(self) -> int:
        """Channels of a head that are rotated by their position."""
        latent = self._model.latent
        return latent.rope_head_dim if latent else self._model.head_dim

    @property
    def _outputs(self) -> int:
        """Channels of the attention's output on this rank."""
        latent = self._model.latent
        size = latent.value_head_dim if latent else self._model.head_dim
        return self._model.num_attention_heads * size // self.tp

    @property
    def _rotates_fused(self) -> bool:
        """Does a kernel of Transformer Engine rotate, which keeps nothing but the one table?"""
        return self._fused("rope") and self._model.latent is None

    def _fused(self, name: Fusion) -> bool:
        off = self._settings.disabled_fusions
        return self._kernels == "transformer_engine" and name not in off

    def _rotary_table(self) -> int:
        return FLOAT32 * max(self._pack.lengths) * self._rotary

    def _attention_inputs(self) -> int:
        """Rotary tables, norms of queries and keys, low-rank projections; the output's input."""
        model, latent = self._model, self._model.latent
        total = self.item * self.tokens * self._outputs  # what the output projection gets
        if not self._rotates_fused:
            total += 4 * self.item * self.tokens * self._rotary  # cos, sin; queries, keys
        if latent:
            for width in filter(None, (latent.q_lora_rank, latent.kv_lora_rank)):
                total += self._norm(self.split_tokens, width)
                total += self.item * self.split_tokens * width
        elif model.qk_norm:
            heads = (model.num_attention_heads + model.num_query_groups) // self.tp
            total += FLOAT32 * self.tokens * heads
            normalised = FLOAT32 * self.tokens * (self._queries + self._keys)
            if self._kernels == "cpu" and self.item < FLOAT32:
                total += 2 * normalised
            else:
                # The keys' norm keeps the projection's whole result, of which several groups'
                # queries were copied.
                total += self._projected() + (normalised if self._kernels == "cpu" else 0)
                if model.num_query_groups > self.tp:
                    total += self.item * self.tokens * self._queries
        return total

    def _projected(self) -> int:
        """Queries, keys and values as their one projection gives them."""
        return self.item * self.tokens * (self._queries + self._keys + self._values)

    def _core_attention(self) -> int:
        """Queries, keys, values, output and softmax sums, [T, ...]."""
        heads = self._model.num_attention_heads // self.tp
        own, gathered = self.tokens, self.tokens * self._parallel.context
        if self._model.latent and self._kernels == "cpu":
            # Torch's plain attention where heads of keys and values differ: all in float32, and the
            # matrix of probabilities.
            probabilities = FLOAT32 * heads * self._pack.squares // self._parallel.context
            values = self._values + (self._keys if self.item == FLOAT32 else 0)
            width = own * self._queries + gathered * (self._keys + values)
            return FLOAT32 * width + probabilities
        values, outputs = self._values, self._outputs
        if self._model.latent:
            # Newer releases of Megatron-Core pad the values to the width of the keys.
            values = outputs = self._queries
        total = self.item * (own * self._queries + gathered * (self._keys + values))
        total += FLOAT32 * heads * own
        if self._kernels != "transformer_engine":
            total += self.item * own * outputs  # by sequence, before they are joined
            total += self._masks()
        return total

    def _masks(self) -> int:
        """The bytes of the masks: two chunks of each sequence meet all keys before them (context
        parallelism)."""
        size = self._parallel.context
        if size == 1:
            return 0
        pairs = self._pack.squares * (2 * size + 1) // (4 * size * size)
        return self.item * pairs + INT64 * self._pack.tokens

    def _core_attention_inputs(self) -> int:
        """What is kept of a core attention that is computed again."""
        total = self.item * self.tokens * (self._queries + self._keys)
        if self._model.latent:
            return total + self.item * self.tokens * self._values
        already = self._model.qk_norm and (self._kernels != "cpu" or self.item == FLOAT32)
        # The values lie within the projection's result, which stays as a whole.
        return total if already else total + self._projected()

    def _gated(self, rows: int, width: int, *, weighted: bool = False) -> int:
        """Between the two products of a feed-forward part: gate and up, their parts, the result.

        A fused kernel leaves the parts out, unless the layer has experts: see actor.fusions.
        """
        parts = 0 if self._fused("activation") and not self._model.moe_layers else 2
        return self.item * rows * (3 + parts + weighted) * width

    def _dense(self) -> int:
        return self._gated(self.tokens, self._model.ffn_hidden_size // self.tp)

    def _less_in_eight_bits(self, has_experts: bool) -> int:
        """Inputs of 8-bit products are kept in 8 bits: what both norms give, and the gated result;
        what attention gives is kept in both forms. Of experts and latents nothing is taken off."""
        if self._model.latent:
            return 0
        attention = self.split_tokens * self._model.hidden_size - self.tokens * self._outputs
        if has_experts:
            return attention
        width = self._model.ffn_hidden_size // self.tp
        return attention + self.split_tokens * self._model.hidden_size + self.tokens * width

    def _routed_rows(self) -> int:
        """Rows that the experts of this rank get if all experts get as many."""
        model, parallel = self._model, self._parallel
        return self.split_tokens * model.experts_per_token * parallel.expert_tensor_size

    def _experts(self) -> int:
        model = self._model
        rows = self._routed_rows()
        width = model.expert_ffn_size // self._parallel.expert_tensor_size
        routed = self.item * rows * model.hidden_size + self._gated(rows, width, weighted=True)
        chosen = model.experts_per_token
        router = self.split_tokens * (5 * model.num_experts + 24 * chosen)
        shared = self._gated(self.tokens, model.shared_expert_ffn_size // self.tp)
        return routed + router + shared


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches of which a stage keeps activations at once, in units of all its layers.

    One forward, one backward (1F1B): a stage starts as many as there are stages from it to the end;
    interleaved, Megatron's schedule starts more, each of a part of the layers.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return min(stages - stage, micro_batches)
    started = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(started, micro_batches * chunks) / chunks
