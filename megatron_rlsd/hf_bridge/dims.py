"""The sizes that the shapes of a decoder-only model's weights are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rlsd.hf_bridge.errors import HFConfigError

Size = Literal["hidden_size", "attention_size", "ffn_hidden_size", "head_dim"]


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the whole model, before any split over tensor-parallel ranks."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    head_dim: int
    """Channels of one head; need not be hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding in the Hugging Face checkpoint."""
    padded_vocab_size: int
    """Rows of the embedding in the Megatron model, all tensor-parallel ranks together."""
    tied_embeddings: bool
    """The output layer uses the embedding's weight."""

    @property
    def attention_size(self) -> int:
        """Columns of the attention output projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def size(self, name: Size) -> int:
        return int(getattr(self, name))

    def check(self, tp_size: int) -> None:
        """Raise HFConfigError, with the numbers, where ``tp_size`` cannot split the sizes."""
        if self.num_attention_heads % self.num_query_groups:
            raise HFConfigError(
                f"num_key_value_heads={self.num_query_groups} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise HFConfigError(
                f"the model's vocabulary of {self.padded_vocab_size} rows cannot hold the "
                f"checkpoint's vocab_size={self.vocab_size}"
            )
        for name in ("num_query_groups", "ffn_hidden_size", "padded_vocab_size"):
            value = getattr(self, name)
            if value % tp_size:
                raise HFConfigError(
                    f"tensor parallel size {tp_size} must divide {name}={value}; "
                    f"{value} mod {tp_size} = {value % tp_size}"
                )
