"""The modules: parameters, their names, and Transformer Engine's own marks on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PUBLIC = (
    *("Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "LayerNorm"),
    *("DotProductAttention", "Fp8Padding", "Fp8Unpadding"),
)
UNUSED_OPERATIONS = (
    *("AllReduce", "BasicLinear", "Bias", "FusibleOperation", "GEGLU", "GELU", "GroupedLinear"),
    *("LayerNorm", "MakeExtraOutput", "RMSNorm", "ReGLU", "ReLU", "ReduceScatter", "SiLU"),
    *("ScaledSwiGLU", "Sequential"),
)
UNUSED_IN_DISTRIBUTED = (
    *("CudaRNGStatesTracker", "activation_recompute_forward", "checkpoint"),
    *("get_all_rng_states", "is_fp8_activation_recompute_enabled"),
)
UNUSED_PERMUTATIONS = (
    *("moe_permute", "moe_permute_with_probs", "moe_permute_and_pad_with_probs"),
    *("moe_sort_chunks_by_index", "moe_sort_chunks_by_index_with_probs", "moe_unpermute"),
)
UNUSED_ROUTING = (
    *("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"),
    "fused_topk_with_score_function",
)


class Unused:
    """A name that Megatron imports and these tests never call."""

    apply = None


@contextlib.contextmanager
def unused_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class QuantizedTensor(Tensor):
    pass


class Float8Tensor(QuantizedTensor):
    pass


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()


class Fp8Unpadding(Fp8Padding):
    pass


class SwiGLU(nn.Module):
    pass


def _mark(parameter: nn.Parameter, dimension: int) -> None:
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dimension
    parameter.partition_stride = 1


class _Module(nn.Module):
    """What Megatron asks of every module with products."""

    fp8 = fp8_calibration = False
    fp8_meta: ClassVar[dict[str, Any]] = {"fp8_checkpoint": False}

    def _settle(
        self,
        tp_group: Any,
        tp_size: int,
        parallel_mode: str | None,
        sequence_parallel: bool,
        sizes: tuple[int, int],
    ) -> tuple[int, int]:
        """This rank's (in, out) features; Transformer Engine's attributes of the layout."""
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.in_features, self.out_features = sizes
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            self.in_features //= self.tp_size
        return self.in_features, self.out_features

    def _weight(self, name: str, dtype: torch.dtype | None, init: Callable[..., Any]) -> None:
        weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=dtype))
        init(weight)
        self.register_parameter(name, weight)

    def _bias(self, name: str, wanted: bool, dtype: torch.dtype | None) -> None:
        if not wanted:
            setattr(self, name, torch.empty(0, dtype=dtype))
            return
        bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype))
        self.register_parameter(name, bias)
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            _mark(bias, 0)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation, self.return_bias = fuse_wgrad_accumulation, return_bias
        self.use_bias = bias
        sizes = in_features, out_features
        self._settle(tp_group, tp_size, parallel_mode, sequence_parallel, sizes)
        self._weight("weight", params_dtype, init_method)
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        self._bias("bias", bias, params_dtype)


class LayerNormLinear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if normalization != "RMSNorm":
            raise NotImplementedError(normalization)
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        self.fuse_wgrad_accumulation, self.return_bias = fuse_wgrad_accumulation, return_bias
        self.use_bias = bias
        sizes = in_features, out_features
        self._settle(tp_group, tp_size, parallel_mode, sequence_parallel, sizes)
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self._weight("weight", params_dtype, init_method)
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        self._bias("bias", bias, params_dtype)


class GroupedLinear(_Module):
    """Unlike the others it marks none of its weights as split."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.fuse_wgrad_accumulation, self.return_bias = fuse_wgrad_accumulation, return_bias
        self.use_bias = bias
        sizes = in_features, out_features
        self._settle(tp_group, tp_size, parallel_mode, sequence_parallel, sizes)
        for number in range(num_gemms):
            self._weight(f"weight{number}", params_dtype, init_method)
            self._bias(f"bias{number}", bias, params_dtype)


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        size = normalized_shape or hidden_size
        self.weight = nn.Parameter(torch.ones(size, dtype=params_dtype or kwargs.get("dtype")))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel


class LayerNorm(RMSNorm):
    pass


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = channels**-0.5 if softmax_scale is None else softmax_scale
        self.cp_group = cp_group
