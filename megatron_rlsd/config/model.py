"""Model, tokenizer and how they are split over processes."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_rlsd.config.section import Section

_NO_PARAMETERS = {
    "none": "there are no 8-bit products",
    "current": "its scales are not powers of two, so that bfloat16 copies (servers, teacher, "
    "checkpoints) are not exactly the weights that the trainer computes with",
    "mxfp8": "Megatron-Core gathers such weights in bfloat16 through its gradient buffer",
}


class PrecisionConfig(Section):
    """Arithmetic inside the transformer layers. The head, the log-probabilities and the loss are no
    part of it: they take hidden states and weights in model.dtype and count in float32."""

    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose modules the layers are made of. auto: Transformer Engine's where CUDA and it are."""
    fp8: Literal["none", "current", "blockwise", "mxfp8"] = "none"
    """Scaling of 8-bit products: by the tensor's own maximum, by blocks (Hopper), by blocks of 32
    (Blackwell). Weights, gradients and optimizer stay in model.dtype and float32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: gradients in e5m2. None: hybrid with fp8=current; e4m3 with scales of blocks, which
    need no wider range, as Transformer Engine's own recipes have it."""
    fp8_amax_history: int = Field(1024, ge=1)
    """Has no effect; kept so that configurations of earlier runs can be read."""
    first_layers_bf16: int = Field(0, ge=0)
    last_layers_bf16: int = Field(0, ge=0)
    """Layers at the model's start and end whose products stay in bfloat16."""
    fp8_parameters: bool = False
    """Hold the weights of the 8-bit products in 8 bits, beside the optimizer's float32 masters
    (Megatron's fp8_param_gather). With fp8=blockwise and optimizer.distributed."""

    @field_validator("fp8", mode="before")
    @classmethod
    def _scales_are_functions_of_the_values(cls, value: object) -> object:
        if value == "delayed":
            raise ValueError(
                "delayed scaling is not offered: its scales follow from earlier passes, so that a "
                "teacher's pass would change the student's next one, and a resume would be another "
                "run; use current or blockwise"
            )
        return value

    @model_validator(mode="after")
    def _possible(self) -> PrecisionConfig:
        kept = self.first_layers_bf16 or self.last_layers_bf16
        if self.fp8 == "none" and kept:
            raise ValueError(
                f"first_layers_bf16={self.first_layers_bf16} and last_layers_bf16="
                f"{self.last_layers_bf16} mean nothing with fp8=none"
            )
        if self.fp8 != "none" and self.layers == "local":
            raise ValueError(
                f"fp8={self.fp8} needs layers=transformer_engine (or auto): the local layers have "
                "no 8-bit products"
            )
        if self.fp8_parameters and self.fp8 != "blockwise":
            raise ValueError(
                f"fp8_parameters=true needs fp8=blockwise, got fp8={self.fp8}: "
                f"{_NO_PARAMETERS[self.fp8]}"
            )
        return self

    @property
    def scales_blocks(self) -> bool:
        """Has each block of a tensor a scale of its own?"""
        return self.fp8 in ("blockwise", "mxfp8")

    @property
    def token_multiple(self) -> int:
        """Tokens of a rank's micro-batch are a multiple of this: 8-bit products demand it."""
        return {"none": 1, "current": 16, "mxfp8": 32, "blockwise": 128}[self.fp8]


Fusion = Literal["rope", "activation", "weight_gradient", "moe_permute", "moe_router"]


class ModelConfig(Section):
    hf_path: str
    """Folder with config.json and safetensors; the architecture and the initial weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    precision: PrecisionConfig = PrecisionConfig()
    disabled_fusions: list[Fusion] = []
    """Fused kernels of Transformer Engine that are not to run (all that it has do): rotation of
    queries and keys, SwiGLU, weight gradients added in place, moving tokens to experts, routing."""
    tp_comm_overlap: bool = False
    """Communication of tensor parallelism beside the products (Transformer Engine's userbuffers).
    Every micro-batch is then padded to train.max_tokens_per_microbatch tokens."""
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[str] = ["core_attn"]
    """For selective recompute: Megatron's names (core_attn, mlp, layernorm, ...)."""
    recompute_num_layers: int = Field(1, ge=1)
    """For full recompute: layers per checkpointed unit."""

    @model_validator(mode="after")
    def _products_fit_the_weights(self) -> ModelConfig:
        if self.precision.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(
                f"precision.fp8={self.precision.fp8} needs dtype=bfloat16, got dtype={self.dtype}"
            )
        return self

    @model_validator(mode="after")
    def _buffers_fit_the_products(self) -> ModelConfig:
        if not self.tp_comm_overlap:
            return self
        if self.dtype != "bfloat16":
            raise ValueError(
                f"tp_comm_overlap=true needs dtype=bfloat16, got dtype={self.dtype}: userbuffers "
                "count in elements of two bytes"
            )
        if self.precision.layers == "local":
            raise ValueError(
                "tp_comm_overlap=true needs precision.layers=transformer_engine (or auto): the "
                "local layers have no userbuffers"
            )
        if self.precision.scales_blocks:
            raise ValueError(
                f"tp_comm_overlap=true needs precision.fp8=none or current, got "
                f"{self.precision.fp8}: Transformer Engine's userbuffers "
                + (
                    "do not take tensors scaled by blocks"
                    if self.precision.fp8 == "blockwise"
                    else "would need every split of a product in multiples of 128"
                )
            )
        return self


class TokenizerConfig(Section):
    path: str | None = None
    """Tokenizer folder or sentencepiece file; default: model.hf_path."""
    kind: Literal["auto", "hf", "sentencepiece"] = "auto"
    chat_template: str | None = None
    """A Jinja chat template in place of the tokenizer's own (required where it has none): the
    template itself, a file with it, or the name of one of the tokenizer's templates."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, as ``enable_thinking: false``. Exports have them as
    defaults."""
    template_date: datetime.date = datetime.date(2024, 7, 26)
    """The day that a chat template gets which writes the current date (``strftime_now``)."""


class ParallelConfig(Section):
    """Processes = tensor x context x pipeline x data parallel, which takes what is left."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks on each pipeline stage, interleaved (needs pipeline > 1): smaller bubbles for
    more communication. The number of micro-batches is then a multiple of pipeline."""
    pipeline_first_stage_layers: int | None = Field(None, ge=1)
    pipeline_last_stage_layers: int | None = Field(None, ge=1)
    """Layers of the first and of the last pipeline stage, whose embedding and head cost time too;
    the other stages share the rest evenly."""
    context: int = Field(1, ge=1)
    """Ranks that share each sequence: every one holds two chunks of it, 1 / context in all."""
    expert: int = Field(1, ge=1)
    """Ranks that share the experts of each mixture-of-experts layer. Taken out of the tensor,
    context and data-parallel ranks of a pipeline stage, not in addition to them."""
    expert_tensor: int | None = Field(None, ge=1)
    """Ranks that split each expert; default: as tensor."""
    dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens reach their experts: by all-to-all collectives, or by DeepEP's kernels (Megatron's
    flex dispatcher; needs the package deep_ep, GPUs, and expert > 1)."""
    sequence: bool = False
    """Split activations between tensor-parallel regions over the sequence (needs tensor > 1)."""

    @model_validator(mode="after")
    def _dependent_sizes(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1, got tensor=1")
        if self.dispatcher == "deepep" and self.expert == 1:
            raise ValueError("dispatcher=deepep needs expert > 1, got expert=1: nothing is sent")
        for key in (
            "virtual_pipeline", "pipeline_first_stage_layers", "pipeline_last_stage_layers"
        ):  # fmt: skip
            value = getattr(self, key)
            if self.pipeline == 1 and value not in (None, type(self).model_fields[key].default):
                raise ValueError(f"{key}={value} needs pipeline > 1, got pipeline=1")
        return self

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor`` with its default applied."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this many tokens."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """What the layout asks of a micro-batch's tokens; see Config.pack_multiple."""
        return self.sequence_multiple * (self.tensor if self.sequence else 1)
