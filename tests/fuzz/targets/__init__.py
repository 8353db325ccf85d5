"""The fuzz targets by name: every module in this folder is one."""

from __future__ import annotations

import importlib
import pkgutil

from tests.fuzz.driver import Target

TARGETS: dict[str, Target] = {
    found.name: importlib.import_module(f"{__name__}.{found.name}")
    for found in pkgutil.iter_modules(__path__)
}
