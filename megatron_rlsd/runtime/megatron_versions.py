"""What differs between the supported Megatron-Core releases: the one place that asks which it is.

Nothing here imports Megatron, so that a layout can be judged before anything is loaded. Where both
ends of the range can be served by the same code, the rest of the package does that instead.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.releases import release

SUPPORTED = ((0, 16, 1), (0, 20, 0))
"""Lowest supported release, and the first one that is not."""


def check_megatron_version() -> tuple[int, ...]:
    """The installed release, as (0, 16, 1). UserError when it is missing or not supported."""
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not installed; expected >= {low}, < {high}") from None
    found = release(installed)
    if not SUPPORTED[0] <= found < SUPPORTED[1]:
        raise UserError(f"megatron-core {installed} is not supported; expected >= {low}, < {high}")
    return found
