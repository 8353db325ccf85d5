"""Tiles of the fused head's product kernel that gpu_head times side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_rlsd.ops import triton_launch
from megatron_rlsd.ops.triton_kernels import product_kernel


@dataclass(frozen=True)
class Tile:
    """One way to cut the product; ``default`` marks those that triton_launch offers too."""

    rows: int
    blocks: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    group_rows: int = 2048
    default: bool = False

    def __str__(self) -> str:
        columns = self.blocks * triton_launch.VOCAB_BLOCK
        return (
            f"{self.rows}x{columns}x{self.depth} {self.warps} warps {self.stages} stages "
            f"{self.programs} a SM, groups of {self.group_rows}"
        )


TILES = [
    Tile(128, 2, 64, 8, 4, group_rows=1024, default=True),
    Tile(128, 2, 64, 8, 3, group_rows=1024, default=True),
    Tile(128, 2, 64, 8, 4, group_rows=4096, default=True),
    Tile(256, 1, 64, 8, 3),
    Tile(128, 1, 64, 8, 4),
]


def tile_kernel(
    tile: Tile,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    exp: Tensor | None,
    *,
    with_entropy: bool,
) -> Callable[[], Tensor]:
    """A call of the product kernel with this tile, on matrices that take descriptors."""
    (C, D), V = hidden.shape, weight.shape[0]
    block = triton_launch.VOCAB_BLOCK
    columns = tile.blocks * block
    programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count * tile.programs
    grid = (min(triton.cdiv(C, tile.rows) * triton.cdiv(V, columns), programs),)

    def descriptor(matrix: Tensor | None, shape: list[int]) -> Any:
        return None if matrix is None else TensorDescriptor.from_tensor(matrix, shape)

    def run() -> Tensor:
        partials = hidden.new_empty(
            triton_launch.vocab_blocks(V), 3 + with_entropy, C, dtype=torch.float32
        )
        product_kernel[grid](
            hidden=descriptor(hidden, [tile.rows, tile.depth]),
            weight=descriptor(weight, [columns, tile.depth]),
            exp_out=descriptor(exp, [tile.rows, block]),
            target_ids=targets,
            partials=partials,
            C=C,
            V=V,
            D=D,
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            exp_stride=0 if exp is None else exp.stride(0),
            scale=1.0,
            softcap=None,
            BLOCK_C=tile.rows,
            BLOCK_V=block,
            TILE_V=columns,
            BLOCK_D=tile.depth,
            GROUP_C=tile.group_rows // tile.rows,
            PROGRAMS_PER_SM=tile.programs,
            DESCRIPTORS=True,
            INPUT_PRECISION="ieee",
            WIDEN=False,
            WITH_ENTROPY=with_entropy,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        return partials

    return run
