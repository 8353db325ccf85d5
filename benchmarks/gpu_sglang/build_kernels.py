"""Build, without a GPU, the kernels that SGLang compiles for stage `served`'s models.

Run by benchmarks/gpu_sglang.sh in SGLang's environment. torch is told that there is an H100; only
what SGLang asks on the way to its compiler is answered.
"""

from __future__ import annotations

import sys
import types

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "H100"
torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
    name="H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, gcnArchName=""
)

from sglang.kernels.ops.activation import activation  # noqa: E402
from sglang.kernels.ops.attention import clamp_position, rope  # noqa: E402
from sglang.kernels.ops.kvcache import kvcache  # noqa: E402
from sglang.kernels.ops.layernorm import norm  # noqa: E402

WIDTHS = ((64, 3), (128, 8))
"""Size of a head and key-value heads of gpu_loop's model and of the wide one."""


def main() -> int:
    dtype = torch.bfloat16
    clamp_position._jit_clamp_position_module(torch.int64)
    activation.activation_module(dtype)
    for size, heads in WIDTHS:
        norm._jit_qknorm_module(size, dtype)
        rope._jit_fused_rope_module(True, size, dtype, dtype)
        row = size * heads * dtype.itemsize
        kvcache._jit_kvcache_module(row, row, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
