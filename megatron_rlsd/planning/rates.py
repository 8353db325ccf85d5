"""The rates that times are estimated with: assumptions, each of which can be given."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_rlsd.runtime.errors import UserError


@dataclass(frozen=True)
class Rates:
    """The rates of one GPU, in the units of the names; defaults: an H100 SXM in an HGX machine."""

    peak_tflops: float = 989.0
    """Dense bfloat16."""
    product_efficiency: float = 0.6
    """The speed of matrix products, as a share of the peak."""
    fp8_gain: float = 1.5
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
