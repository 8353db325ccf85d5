"""The rates that times are estimated with: assumptions, each of which can be given."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from megatron_rlsd.runtime.errors import UserError

PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""Dense bfloat16 of GPUs by a word of their name, from their data sheets."""
H100_PCIE_TFLOPS = 756.0


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak of the GPU that CUDA calls so; None: it is not known."""
    words = set(re.split(r"[ -]", device_name.upper()))
    if words & {"MIG", "NVL"}:  # a part of the chip, or another clock
        return None
    if {"H100", "PCIE"} <= words:
        return H100_PCIE_TFLOPS
    return next((PEAK_TFLOPS[word] for word in words if word in PEAK_TFLOPS), None)


@dataclass(frozen=True)
class Rates:
    """The rates of one GPU, in the units of the names; defaults: an H100 SXM in an HGX machine."""

    peak_tflops: float = 989.0
    """Dense bfloat16."""
    product_efficiency: float = 0.6
    """The speed of matrix products, as a share of the peak."""
    fp8_gain: float = 1.3
    """How much faster products in 8 bits are as a whole, quantising included; their peak is 2."""
    attention_efficiency: float = 0.4
    hbm_gbs: float = 3350.0
    hbm_efficiency: float = 0.6
    """The rate of the engine's decoding, as a share of the memory's rate."""
    nvlink_gbs: float = 300.0
    """Each way between GPUs of one machine, as collectives reach it."""
    network_gbs: float = 40.0
    """Each way per GPU between machines (400 Gb/s)."""
    pcie_gbs: float = 25.0
    """Between a GPU and pinned host memory."""
    disk_gbs: float = 2.0
    """The rate of a folder that all machines share, all readers together."""
    decode_overhead_ms: float = 3.0
    """The fixed time of one decoding step of the engine, whatever its batch."""
    expert_start_us: float = 50.0
    """The time to start the kernels of one expert in one pass over a micro-batch, whatever its
    rows: Megatron's local layers run one expert after the other."""

    def with_given(self, given: list[str]) -> Rates:
        """Replace rates by ``name=number`` texts; UserError names an unknown or bad one."""
        known = {each.name for each in fields(self)}
        changes = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in known:
                raise UserError(f"no rate {name!r}; known: {', '.join(sorted(known))}")
            try:
                number = float(value)
            except ValueError:
                raise UserError(f"rate {text!r} must look like {name}=NUMBER") from None
            if not number > 0:
                raise UserError(f"rate {text!r} must be above 0")
            changes[name] = number
        return replace(self, **changes)
