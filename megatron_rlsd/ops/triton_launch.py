"""Launching the kernels of ``triton_kernels``: tile sizes, tensor descriptors, tuning.

Shapes as there. Triton times the few candidates of ``candidates`` when a device, a dtype and a
size class of C are first met, which takes seconds, and keeps the fastest. Every candidate gives
the same vocabulary blocks, so ranks that choose differently still agree on every buffer's size.

On an H100 the candidates lie within 10% of each other and of cuBLAS's bare product
(docs/fused_head.md); that they compile for compute capabilities 8.0 and 9.0 within their shared
memory, and without spills where a bound says so, is held by a test.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_rlsd.ops.triton_kernels import (
    exp_to_gradient_kernel,
    merge_kernel,
    product_kernel,
)
from megatron_rlsd.runtime.rounding import round_up

INTERPRETED = not isinstance(product_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when triton was imported: kernels run on the CPU, in numpy."""
VOCAB_BLOCK = 32 if INTERPRETED else 128
"""Vocabulary rows of a block; small where tests want several blocks of a small vocabulary."""
ROW_ALIGNMENT = 64
"""Numbers that a row of E is a multiple of: descriptors and cuBLAS want 16 bytes at the least."""
ELEMENTS_PER_PROGRAM = 2048
"""The elements that a program of exp_to_gradient_kernel takes: 16 bytes a thread in bfloat16."""
MERGED_ROWS, MERGED_BLOCKS = 32, 32
"""What a program of merge_kernel takes at a time."""
HOPPER = (9, 0)


def vocab_blocks(V: int) -> int:
    """B: blocks that V vocabulary rows make."""
    return -(-V // VOCAB_BLOCK)


def new_exp_buffer(C: int, V: int, like: Tensor) -> Tensor:
    """[C, V], not filled, in like's dtype and on its device, with aligned rows."""
    return like.new_empty(C, round_up(V, ROW_ALIGNMENT))[:, :V]


def launch_product(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    target_ids_C: Tensor,
    *,
    scale: float,
    softcap: float | None,
    with_entropy: bool,
    exp_CV: Tensor | None,
) -> Tensor:
    """Run product_kernel; gives its partials [B, K, C].

    Args:
        hidden_CD, weight_VD: of one dtype, with contiguous rows; C and V at least 1.
        target_ids_C: int32, counted from this rank's first row, -1 where another rank holds it.
        exp_CV: of new_exp_buffer, to be filled with exp(z - block maximum); None: not wanted.
    """
    (C, D), V = hidden_CD.shape, weight_VD.shape[0]
    partials_BKC = hidden_CD.new_empty(vocab_blocks(V), 3 + with_entropy, C, dtype=torch.float32)
    matrices = {"hidden": hidden_CD, "weight": weight_VD, "exp_out": exp_CV}
    capability, sums_only = _capability(hidden_CD.device), exp_CV is None
    descriptors = capability >= HOPPER and all(map(_has_descriptor, matrices.values()))
    kernel = _tuned_product(capability, hidden_CD.dtype, _size_class(C), descriptors, sums_only)
    programs = _processors(hidden_CD.device)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(C, meta["BLOCK_C"]) * triton.cdiv(V, meta["TILE_V"])
        return (min(tiles, programs * meta["PROGRAMS_PER_SM"]),)

    with torch.cuda.device_of(hidden_CD):
        kernel[grid](
            **{name: _argument(x, descriptors) for name, x in matrices.items()},
            target_ids=target_ids_C,
            partials=partials_BKC,
            C=C,
            V=V,
            D=D,
            hidden_stride=hidden_CD.stride(0),
            weight_stride=weight_VD.stride(0),
            exp_stride=0 if exp_CV is None else exp_CV.stride(0),
            scale=scale,
            softcap=softcap,
            BLOCK_V=VOCAB_BLOCK,
            DESCRIPTORS=descriptors,
            # TF32 would cost float32 inputs three decimal places.
            INPUT_PRECISION="ieee",
            WIDEN=INTERPRETED,
            WITH_ENTROPY=with_entropy,
            enable_fp_fusion=True,
        )
    return partials_BKC


def launch_merge(partials_BKC: Tensor) -> Tensor:
    """``collectives.merge_partials`` in one kernel: [B, K, C] -> [K, C]."""
    B, K, C = partials_BKC.shape
    merged_KC = partials_BKC.new_empty(K, C)
    with torch.cuda.device_of(partials_BKC):
        merge_kernel[(triton.cdiv(C, MERGED_ROWS),)](
            partials=partials_BKC,
            merged=merged_KC,
            B=B,
            C=C,
            K=K,
            BLOCK_B=MERGED_BLOCKS,
            BLOCK_C=MERGED_ROWS,
            num_warps=4,
        )
    return merged_KC


def launch_exp_to_gradient(
    exp_CV: Tensor,
    partials_BKC: Tensor,
    target_ids_C: Tensor,
    *,
    log_probs_C: Tensor,
    max_logits_C: Tensor,
    log_sums_C: Tensor,
    d_log_probs_C: Tensor,
    d_entropies_C: Tensor | None,
    entropies_C: Tensor | None,
    gain_1: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Run exp_to_gradient_kernel on what launch_product left; [C] tensors are float32."""
    C, V = exp_CV.shape
    blocks = ELEMENTS_PER_PROGRAM // VOCAB_BLOCK
    with torch.cuda.device_of(exp_CV):
        exp_to_gradient_kernel[(C * triton.cdiv(vocab_blocks(V), blocks),)](
            exp_inout=exp_CV,
            partials=partials_BKC,
            target_ids=target_ids_C,
            log_probs=log_probs_C,
            max_logits=max_logits_C,
            log_sums=log_sums_C,
            d_log_probs=d_log_probs_C,
            d_entropies=d_entropies_C,
            entropies=entropies_C,
            gain=gain_1,
            C=C,
            V=V,
            exp_stride=exp_CV.stride(0),
            scale=scale,
            softcap=softcap,
            BLOCK_V=VOCAB_BLOCK,
            BLOCKS=blocks,
            K=partials_BKC.shape[1],
            num_warps=8,
            enable_fp_fusion=True,
        )


@cache
def _tuned_product(
    capability: tuple[int, int],
    dtype: torch.dtype,
    size_class: int,
    descriptors: bool,
    sums_only: bool,
) -> Any:
    """product_kernel with its candidates; tuned anew for each V and D."""
    return triton.autotune(
        configs=candidates(capability, dtype, size_class, descriptors),
        key=["V", "D"],
    )(product_kernel)


def candidates(
    capability: tuple[int, int],
    dtype: torch.dtype,
    size_class: int,
    descriptors: bool,
) -> list[triton.Config]:
    """Tile sizes worth timing. Shared memory: 227 KiB a block on 9.0, 163 on 8.0, 99 on 8.6, 8.9.

    A stage takes (BLOCK_C + TILE_V) * BLOCK_D numbers; E's tile takes BLOCK_C * BLOCK_V more. Two
    vocabulary blocks a tile let Hopper's products be 256 wide, which halves what they read of
    shared memory, and their accumulators leave registers for no spill.
    """
    # BLOCK_C, vocabulary blocks a tile, BLOCK_D, num_warps, num_stages, PROGRAMS_PER_SM, and the
    # rows of a group: about as many as the vocabulary rows in work beside them.
    if INTERPRETED:
        sizes = [(16, 2 if size_class <= 64 else 1, 16, 1, 1, 1, 32)]
    elif dtype == torch.float32:
        sizes = [(64, 1, 16, 8, 3, 4, 2048), (64, 1, 32, 8, 2, 4, 2048)]
    elif size_class <= 64:
        sizes = [(64, 1, 64, 4, 4, 2, 2048), (64, 1, 64, 4, 3, 2, 2048)]
    elif descriptors:
        sizes = [
            (128, 2, 64, 8, 4, 1, 1024),
            (128, 2, 64, 8, 3, 1, 1024),
            (128, 2, 64, 8, 4, 1, 4096),
        ]
    elif capability >= HOPPER:
        sizes = [(128, 1, 64, 8, 3, 2, 2048), (256, 1, 64, 8, 3, 1, 2048)]
    else:
        sizes = [
            (128, 1, 32, 8, 4, 2, 2048),
            (128, 1, 64, 8, 3, 1, 2048),
            (128, 1, 32, 8, 3, 2, 2048),
        ]
    return [
        triton.Config(
            {
                "BLOCK_C": block_c,
                "TILE_V": blocks * VOCAB_BLOCK,
                "BLOCK_D": block_d,
                "GROUP_C": group_rows // block_c,
                "PROGRAMS_PER_SM": programs,
            },
            num_warps=warps,
            num_stages=stages,
            pre_hook=_set_block_shapes if descriptors else None,
        )
        for block_c, blocks, block_d, warps, stages, programs, group_rows in sizes
    ]


def _set_block_shapes(arguments: dict[str, Any]) -> None:
    """Descriptors carry the tile size, which is only known once a candidate is chosen."""
    block_c, block_d = arguments["BLOCK_C"], arguments["BLOCK_D"]
    arguments["hidden"].block_shape = [block_c, block_d]
    arguments["weight"].block_shape = [arguments["TILE_V"], block_d]
    if arguments["exp_out"] is not None:
        arguments["exp_out"].block_shape = [block_c, arguments["BLOCK_V"]]


def _argument(matrix: Tensor | None, descriptors: bool) -> Any:
    if matrix is None or not descriptors:
        return matrix
    return TensorDescriptor.from_tensor(matrix, [1, 16])  # see _set_block_shapes


def _has_descriptor(matrix: Tensor | None) -> bool:
    """The copy engine wants 16-byte rows and bases; float32 is bound by its arithmetic anyway."""
    if matrix is None:
        return True
    is_aligned = matrix.stride(0) * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    return matrix.itemsize == 2 and is_aligned


def _size_class(C: int) -> int:
    """C of the same class are tuned once: a last short chunk must not tune anew."""
    return 64 if C <= 64 else 1024 if C <= 1024 else 2**30


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The interpreter takes descriptors, so it stands for the newest."""
    return HOPPER if INTERPRETED else torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    # Few, so that the interpreter's programs take several tiles each.
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
