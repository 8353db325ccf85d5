"""Reads version numbers, in one place."""

from __future__ import annotations

from packaging.version import Version


def release(version: str) -> tuple[int, int, int]:
    """The first three numbers of a version, as (2, 6, 0) for ``2.6a0+nv25.1``.

    Raises packaging's InvalidVersion, a ValueError, where it is not a version number.
    """
    major, minor, micro = (*Version(version).release, 0, 0)[:3]
    return major, minor, micro
