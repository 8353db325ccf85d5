"""What Transformer Engine's modules compute, in plain torch: their ``forward`` on a machine without
a GPU. Everything else of them stays as it is: parameters, names, marks, Megatron's wrappers.

N tokens of a pack, H heads of this rank, D channels.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _IntoMainGrad(torch.autograd.Function):
    """A linear layer whose weight gradient goes straight into Megatron's float32 one.

    As in Transformer Engine what is returned for the weight is a dummy, which Megatron's hook must
    not use; here its numbers would be noticed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,), (x,), weight = grads, ctx.saved_tensors, ctx.weight
        # In float32, which is all that the kernels round to.
        rows, inputs = (t.flatten(0, -2).to(weight.main_grad.dtype) for t in (grad, x))
        weight.main_grad.add_(rows.t().matmul(inputs))
        if not hasattr(weight, "grad_added_to_main_grad"):
            return grad.matmul(weight), None
        weight.grad_added_to_main_grad = True
        fill = 0.0 if getattr(weight, "zero_out_wgrad", False) else float("nan")
        return grad.matmul(weight), torch.full_like(weight, fill)


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    if module.fuse_wgrad_accumulation and torch.is_grad_enabled():
        return _IntoMainGrad.apply(x, weight)
    return F.linear(x, weight)


def _enter(module: Any, x: Tensor) -> Tensor:
    """The whole sequence, for a layer whose output features are split."""
    from megatron.core.tensor_parallel import mappings

    if module.parallel_mode != "column" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, group=module.tp_group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=module.tp_group)


def _leave(module: Any, x: Tensor) -> Tensor:
    """The sum over ranks, for a layer whose input features are split."""
    from megatron.core.tensor_parallel import mappings

    if module.parallel_mode != "row" or module.tp_size == 1:
        return x
    if module.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(x, group=module.tp_group)
    return mappings.reduce_from_tensor_model_parallel_region(x, group=module.tp_group)


def _biased(module: Any, out: Tensor) -> Any:
    bias = getattr(module, "bias", None)
    bias = bias if torch.is_tensor(bias) and bias.numel() else None
    if module.return_bias:
        return out, bias
    return out if bias is None else out + bias


def linear(module: Any, x: Tensor, *_: Any, **__: Any) -> Any:
    return _biased(module, _leave(module, _product(module, _enter(module, x), module.weight)))


def norm_and_linear(module: Any, x: Tensor, *_: Any, **__: Any) -> Any:
    normed = F.rms_norm(x, x.shape[-1:], module.layer_norm_weight, module.eps)
    out = _biased(module, _product(module, _enter(module, normed), module.weight))
    if not module.return_layernorm_output:
        return out
    return (*out, normed) if module.return_bias else (out, normed)


def grouped_linear(module: Any, x: Tensor, m_splits: Any, *_: Any, **__: Any) -> Any:
    """x [N, in], its first m_splits[0] rows for the first expert, and so on."""
    parts = torch.split(x, [int(rows) for rows in m_splits])
    weights = [getattr(module, f"weight{number}") for number in range(module.num_gemms)]
    out = torch.cat([_product(module, p, w) for p, w in zip(parts, weights, strict=True)])
    return (out, [None] * module.num_gemms) if module.return_bias else out


def norm(module: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.eps)


def swiglu(module: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **pack: Any) -> Any:
    """query [N, H, D], key and value [N, G, D] -> [N, H * D]; each sequence sees itself."""
    from megatron_rlsd.actor.layers import PackedAttention

    groups = SimpleNamespace(cp=module.cp_group if module.cp_group is not None else _Alone())
    bounds = pack.get("cu_seqlens_q_padded")
    bounds = (pack["cu_seqlens_q"] if bounds is None else bounds).tolist()
    ours = PackedAttention(SimpleNamespace(), 1, module.softmax_scale, groups)
    out = ours(query, key, value, packed_seq_params=SimpleNamespace(bounds=bounds))
    return out.flatten(1)


class _Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class _Place(SimpleNamespace):
    def rank(self) -> int:
        return int(self.at)

    def size(self) -> int:
        return int(self.of)


def rotate_pack(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0, **_: Any
) -> Tensor:
    """t [N, H, D], rotated by each token's place in its sequence."""
    from megatron.core.models.common.embeddings import rope_utils

    group = _Place(at=cp_rank, of=cp_size)
    bounds = cu_seqlens.tolist()
    # Megatron's plain form takes frequencies of as many rows as the pack for the pack's own.
    longest = max(end - start for start, end in pairwise(bounds))
    return rope_utils._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs[:longest], cp_group=group)


def permute(tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1) -> Any:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.permute(tokens, routing_map, probs, num_out_tokens=num_out_tokens)[:3]


def unpermute(
    permuted: Tensor, indices: Tensor, merging_probs: Any, restore_shape: Any, **_: Any
) -> Tensor:
    from megatron.core.transformer.moe import moe_utils

    assert merging_probs is None
    return moe_utils.unpermute(permuted, indices, restore_shape)


def sort_chunks(x: Tensor, split_sizes: Tensor, sorted_idxs: Tensor) -> Tensor:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.sort_chunks_by_idxs(x, split_sizes, sorted_idxs)[0]


def sort_chunks_with_probs(
    x: Tensor, probs: Tensor, split_sizes: Tensor, sorted_idxs: Tensor
) -> tuple[Tensor, Any]:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.sort_chunks_by_idxs(x, split_sizes, sorted_idxs, probs=probs)


def choose_experts(**settings: Any) -> Any:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.topk_routing_with_score_function(**settings, fused=False)
