"""Names of the recipes of 8-bit products, none of which runs here."""

from __future__ import annotations


class DelayedScaling:
    pass


class Float8CurrentScaling:
    pass


class Float8BlockScaling:
    pass


class MXFP8BlockScaling:
    pass


class NVFP4BlockScaling:
    pass


class Format:
    E4M3 = "e4m3"
    HYBRID = "hybrid"
