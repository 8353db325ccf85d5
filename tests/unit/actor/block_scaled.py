"""A stand-in for Transformer Engine's 8-bit parameters, for machines without a GPU.

``BlockScaled`` is a real tensor subclass with the contract of ``Float8BlockwiseQTensor`` (in
pytorch/tensor of Transformer Engine 2.8): float8_e4m3 numbers and one power-of-two scale for each
block; ``data`` is the tensor itself; ``quantize_`` and ``copy_`` round in place; every other
operation sees a plain dequantized copy; there is no storage; ``get_high_precision_init_val`` is
what a parameter held before it was rounded. ``teach_megatron`` puts it where Megatron-Core
expects Transformer Engine's: ``replace_raw_data`` and ``cast_master_weights_to_fp8`` (in
pytorch/tensor/utils.py), whose algorithm for a shard of a weight is written here again in torch.

It says nothing of Transformer Engine's kernels. What it shows is that loading, masters, snapshots,
checkpoints and export of this project go through the contract and nowhere around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

BLOCK = 8
LARGEST = 448.0


def scales_of(amax: Tensor) -> Tensor:
    """The largest power of two that keeps a block within float8_e4m3."""
    return torch.where(amax > 0, torch.exp2(torch.floor(torch.log2(LARGEST / amax))), 1.0)


class BlockScaled(torch.Tensor):
    _codes: Tensor
    """uint8, the shape of the tensor."""
    _scales: Tensor
    """float32, one of each BLOCK x BLOCK numbers; what the numbers were multiplied by."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, requires_grad: bool = False) -> BlockScaled:
        self = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.bfloat16, requires_grad=requires_grad
        )
        self._codes, self._scales = codes, scales
        return self

    @classmethod
    def of(cls, values: Tensor) -> BlockScaled:
        rows, columns = values.shape
        assert rows % BLOCK == columns % BLOCK == 0
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        return cls(codes, torch.ones(rows // BLOCK, columns // BLOCK)).quantize_(values)

    def quantize_(self, values: Tensor) -> BlockScaled:
        assert type(values) in (Tensor, nn.Parameter)
        blocks = values.detach().float().unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
        self._scales.copy_(scales_of(blocks.abs().amax(dim=(2, 3))))
        self._codes.copy_(encoded(values.detach(), self.scale_of_each()))
        return self

    def dequantize(self) -> Tensor:
        numbers = self._codes.view(torch.float8_e4m3fn).float() / self.scale_of_each()
        return numbers.to(torch.bfloat16)

    def scale_of_each(self) -> Tensor:
        return self._scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    def get_high_precision_init_val(self) -> Tensor | None:
        return getattr(self, "_kept", None)

    def clear_high_precision_init_val(self) -> None:
        if hasattr(self, "_kept"):
            del self._kept

    def expand_as(self, other: Tensor) -> Tensor:
        return _Same.apply(self) if other is self else super().expand_as(other)

    def untyped_storage(self) -> Any:
        raise RuntimeError("a quantized tensor has no storage")

    data = property(
        lambda self: self,
        lambda self, new: None if new is self else self.quantize_(new),
    )
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return BlockScaled(args[0]._codes, args[0]._scales)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], BlockScaled):
            return args[0].quantize_(plain(args[1]))
        if function is torch.ops.aten.view.default:
            raise NotImplementedError("views of a quantized tensor")
        assert not function._schema.is_mutable or not isinstance(args[0], BlockScaled), function
        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class _Same(torch.autograd.Function):
    """Leads Megatron to a parameter's gradient accumulator."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, BlockScaled) else value


def encoded(values: Tensor, scales: Tensor) -> Tensor:
    """float8_e4m3 codes of values * scales, as bytes."""
    scaled = (values.float() * scales).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_layers(chunks: Sequence[nn.Module], first: int) -> Sequence[nn.Module]:
    """Put the weights of the products of layers ``first`` (from 0) and later into 8 bits."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            weight = module._parameters.get("weight")
            parts = path.split(".")
            if weight is None or weight.dim() != 2 or parts[:2] != ["decoder", "layers"]:
                continue
            if int(parts[2]) >= first:
                parameter: Any = nn.Parameter(BlockScaled.of(torch.zeros(weight.shape)))
                vars(parameter).update(vars(weight))
                # As fp8_model_init keeps it: the values that initialisation gave.
                parameter._kept = weight.detach().clone()
                module._parameters["weight"] = parameter
    return chunks


def teach_megatron() -> None:
    """In this process, Megatron takes BlockScaled for Transformer Engine's QuantizedTensor."""
    settings: Any = fp8_utils
    settings.HAVE_TE_FP8_TENSOR_CLASS = True
    settings.FP8_TENSOR_CLASS = BlockScaled
    settings._modify_underlying_storage_impl = replace_raw_data
    settings._quantize_param_shard_impl = cast_master_weights
    reload: Any = distrib_optimizer
    reload.dequantize_fp8_tensor = plain  # which otherwise asks for Transformer Engine's release
    # Megatron gathers 8-bit and other parameters together, and gloo mixes up their bytes then.
    buffers: Any = param_and_grad_buffer
    buffers._coalescing_manager = lambda group, async_ops: nullcontext()


def replace_raw_data(tensor: BlockScaled, new: Tensor) -> None:
    new.copy_(tensor._codes)
    tensor._codes = new


def cast_master_weights(
    parameters: list[BlockScaled],
    masters: list[Tensor | None],
    starts: list[int | None],
    group: dist.ProcessGroup,
    *_: Any,
) -> None:
    """Each rank rounds its shard, by scales that all ranks of the group agree on."""
    for parameter, master, start in zip(parameters, masters, starts, strict=True):
        amax = torch.zeros(parameter._scales.shape)
        shard = None if master is None else master.detach().to(torch.bfloat16).float()
        if shard is not None:
            for block, number in zip(blocks_of(parameter, start, len(shard)), shard, strict=True):
                amax[block] = max(amax[block], abs(number))
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        parameter._scales.copy_(scales_of(amax))
        if shard is not None:
            held = slice(start, start + len(shard))
            each = parameter.scale_of_each().view(-1)[held]
            parameter._codes.view(-1)[held] = encoded(shard, each)


def blocks_of(parameter: BlockScaled, start: Any, count: int) -> Iterator[tuple[int, int]]:
    columns = parameter.shape[1]
    for place in range(start, start + count):
        yield place // columns // BLOCK, place % columns // BLOCK
