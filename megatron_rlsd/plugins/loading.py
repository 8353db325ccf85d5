"""Users' own code: files and modules that register rewards, algorithms or model families.

A configuration names them under ``plugins``. They are imported in that order, by every process
that reads the configuration, before any name in it is looked up. This module imports nothing of
the package, so that whoever looks names up may use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megatron_rlsd.runtime.errors import UserError

FILE_MODULE = "user_file:"
"""Modules made of a user's file are named by this and the file's absolute path."""


def load_plugins(names: Sequence[str]) -> None:
    """Import each plug-in once: ``path/to/file.py``, or the name of an importable module.

    Raises UserError that names the plug-in and what went wrong in it, with the place.
    """
    for name in names:
        is_file = name.endswith(".py") or "/" in name
        path = Path(name).absolute()
        if is_file and not path.is_file():
            raise UserError(f"plugin {name!r}: there is no file {path}")
        try:
            if is_file:
                import_file(path)
            else:
                importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise UserError(
                    f"plugin {name!r}: there is no module of this name; a file is named by its "
                    "path, which ends in .py"
                ) from None
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"plugin {name!r} could not be imported: {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})"
            ) from error


def import_file(path: Path) -> ModuleType:
    """The module that a file holds, imported once; whatever its code raises passes through."""
    path = path.resolve()
    name = f"{FILE_MODULE}{path}"
    if name in sys.modules:
        return sys.modules[name]
    # Last, so that a neighbour called json.py or random.py shadows nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def file_of(module_name: str) -> Path | None:
    """The file that a module of ``import_file`` was made of; None for any other module."""
    if not module_name.startswith(FILE_MODULE):
        return None
    return Path(module_name.removeprefix(FILE_MODULE))
