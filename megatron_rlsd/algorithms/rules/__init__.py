"""Algorithms with functions of their own, one file each: adding one touches no other.

Every module here is imported, and calls ``register_algorithm`` as a user's file would.
"""

from __future__ import annotations

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(module.name)
