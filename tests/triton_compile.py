"""Compile our Triton kernels to machine code for GPUs that are not there; prints what came out.

Run as a program, since Triton cannot compile in a process that interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rlsd.ops import triton_launch
from megatron_rlsd.ops.triton_kernels import exp_to_gradient_kernel, product_kernel

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
CUOBJDUMP = str(Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump")
MANY = 4096
"""Rows, of the size class of long chunks."""
CASES = [
    # capability, dtype, tensor descriptors, E is kept, with entropy, how many candidates
    ((9, 0), torch.bfloat16, True, True, False, 9),
    ((9, 0), torch.bfloat16, True, True, True, 9),
    ((9, 0), torch.bfloat16, True, False, False, 9),
    ((9, 0), torch.bfloat16, False, True, True, 1),
    ((8, 0), torch.bfloat16, False, True, True, 9),
    ((8, 0), torch.float32, False, True, True, 1),
]


def compile_kernel(
    kernel: Any, types: dict[str, Any], capability: tuple[int, int], **options: int
) -> dict[str, Any]:
    """Types are Triton's; anything that is not such a string, or under CONSTANT, is a constant."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        kind = types[name]
        if not isinstance(kind, str) or name == "INPUT_PRECISION":
            signature[name], constants[name] = "constexpr", kind
            continue
        signature[name] = kind.removesuffix(" by 16")
        if kind.startswith("*") or kind.endswith(" by 16"):
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    ptx = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        **registers_and_stack(compiled.asm["cubin"]),
        "warpgroup_products": len(re.findall(r"wgmma\.mma_async", ptx)),
        "warp_products": len(re.findall(r"mma\.sync", ptx)),
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "narrow_accesses": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.b16", ptx)),
        "wide_accesses": len(re.findall(r"(?:ld|st)\.global[\w.:]*v4\.b32", ptx)),
    }


def registers_and_stack(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack: registers that the compiler had to spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+).*?STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack_bytes": int(stack)}


def compile_products(
    capability: tuple[int, int],
    dtype: torch.dtype,
    descriptors: bool,
    keeps_exp: bool,
    with_entropy: bool,
    most: int,
) -> list[dict[str, Any]]:
    found = []
    for candidate in triton_launch.candidates(capability, dtype, MANY, descriptors)[:most]:
        sizes = candidate.kwargs
        c, v, d = sizes["BLOCK_C"], triton_launch.VOCAB_BLOCK, sizes["BLOCK_D"]

        def matrix(rows: int, columns: int) -> str:
            shape = f"tensordesc<{NAMES[dtype]}[{rows}, {columns}]>"
            return shape if descriptors else f"*{NAMES[dtype]}"

        types = {
            "hidden": matrix(c, d),
            "weight": matrix(sizes["TILE_V"], d),
            "exp_out": matrix(c, v) if keeps_exp else None,
            "target_ids": "*i32",
            "partials": "*fp32",
            **dict.fromkeys(("C", "V"), "i32"),
            **dict.fromkeys(("D", "hidden_stride", "weight_stride", "exp_stride"), "i32 by 16"),
            "scale": "fp32",
            "softcap": None,
            "BLOCK_V": v,
            "DESCRIPTORS": descriptors,
            "INPUT_PRECISION": "ieee",
            "WIDEN": False,
            "WITH_ENTROPY": with_entropy,
            **sizes,
        }
        report = compile_kernel(
            product_kernel,
            types,
            capability,
            num_warps=candidate.num_warps,
            num_stages=candidate.num_stages,
        )
        found.append({"candidate": str(candidate), **report})
    return found


def compile_gradient(capability: tuple[int, int], softcap: str | None) -> dict[str, Any]:
    rows = ("log_probs", "max_logits", "log_sums", "d_log_probs", "d_entropies", "entropies")
    types = {
        "exp_inout": "*bf16",
        "target_ids": "*i32",
        **dict.fromkeys((*rows, "partials", "gain"), "*fp32"),
        **dict.fromkeys(("C", "V"), "i32"),
        "exp_stride": "i32 by 16",
        "scale": "fp32",
        "softcap": softcap,
        "BLOCK_V": triton_launch.VOCAB_BLOCK,
        "BLOCKS": triton_launch.ELEMENTS_PER_PROGRAM // triton_launch.VOCAB_BLOCK,
        "K": 4,
    }
    return compile_kernel(exp_to_gradient_kernel, types, capability, num_warps=8)


if __name__ == "__main__":
    products = [
        {
            "capability": case[0],
            "dtype": NAMES[case[1]],
            "descriptors": case[2],
            "with_entropy": case[4],
            "compiled": compile_products(*case),
        }
        for case in CASES
    ]
    gradients = [compile_gradient((8, 0), None), compile_gradient((9, 0), "fp32")]
    json.dump({"products": products, "gradients": gradients}, sys.stdout)
