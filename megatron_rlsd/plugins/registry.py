"""Users' code by name: what is registered, and what a file holds, as ``path/to/file.py:name``.

The trainer only locates it (and refuses what cannot work); a worker process loads it.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_rlsd.plugins.loading import file_of, import_file
from megatron_rlsd.runtime.errors import UserError

Code = TypeVar("Code", bound=Callable[..., Any])
"""A function or a class."""


@dataclass(frozen=True)
class Registered(Generic[Code]):
    code: Code
    imports: tuple[str, ...] = ()
    """Modules that a worker imports before it reports ready, so that no call pays for them."""
    check: Callable[..., None] | None = None
    """Called with the configured params by the trainer; raises ValueError or TypeError."""


@dataclass(frozen=True)
class Reference:
    """Where code is found; plain text, because it travels to the workers."""

    name: str
    """As configured: a registered name, or ``path/to/file.py:name``."""
    attribute: str
    """The registered name, or the name in the file."""
    module: str | None = None
    """Module that registers it; None for code named by its file."""
    path: str | None = None
    """Absolute path of the user's file that holds it; None where ``module`` can be imported."""


class Registry(dict[str, Registered[Code]]):
    """The registered names of one kind of code."""

    def __init__(
        self,
        kind: str,
        *,
        one: str,
        check: Callable[[str, Code, dict[str, Any]], None],
    ) -> None:
        """``kind``: what messages call it, with its article; ``one``: ``function`` or ``Class``.

        ``check(name, code, params)`` raises UserError where the code is none of its kind or does
        not take the params.
        """
        super().__init__()
        self._a_kind, self._kind, self._one = kind, kind.partition(" ")[2], one
        self._check = check

    def add(self, name: str, registered: Registered[Code]) -> None:
        if name in self:
            raise UserError(f"{self._a_kind} named {name!r} is registered already")
        self[name] = registered

    def locate(self, name: str, params: dict[str, Any]) -> Reference:
        """Find code without running any of a file that is named by its path.

        Raises UserError for an unknown name (listing the known ones), a missing or unparsable file,
        a name the file does not define, and params that registered code does not take.
        """
        if name in self:
            return self._locate_registered(name, self[name], params)
        path, separator, attribute = name.rpartition(":")
        if not separator or not path.endswith(".py"):
            raise UserError(
                f"unknown {self._kind} {name!r}; known {self._kind}s: {', '.join(sorted(self))}, "
                f"or a {self._one.lower()} of your own as path/to/file.py:{self._one}"
            )
        self._check_file_defines(name, Path(path), attribute)
        return Reference(name, attribute, path=str(Path(path).resolve()))

    def load(self, reference: Reference, params: dict[str, Any]) -> Code:
        """Import the code (in a worker); whatever its module raises passes through."""
        file = None if reference.path is None else import_file(Path(reference.path))
        if reference.module is None:
            code: Code = getattr(file, reference.attribute)
            self._check(reference.name, code, params)
            return code
        if file is None:
            importlib.import_module(reference.module)
        registered = self[reference.attribute]
        for module in registered.imports:
            importlib.import_module(module)
        return registered.code

    def _locate_registered(
        self, name: str, registered: Registered[Code], params: dict[str, Any]
    ) -> Reference:
        module = registered.code.__module__
        if module == "__main__":
            raise UserError(
                f"{self._kind} {name!r} is registered by the main script, which workers cannot "
                f"import; name it as path/to/file.py:{self._one}"
            )
        self._check(name, registered.code, params)
        if registered.check is not None:
            try:
                registered.check(**params)
            except (ValueError, TypeError) as error:
                raise UserError(f"{self._kind} {name!r}: {error}") from error
        plugin = file_of(module)
        return Reference(name, name, module, None if plugin is None else str(plugin))

    def _check_file_defines(self, name: str, path: Path, attribute: str) -> None:
        about = f"{self._kind} {name!r}"
        if not path.is_file():
            raise UserError(f"{about}: there is no file {path.resolve()}")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{about}: {path} is not valid Python: {error}") from error
        defined = _names_bound_by(tree.body)
        # After a star import only running the file would tell; the worker will.
        if attribute not in defined and "*" not in defined:
            raise UserError(
                f"{about}: {path} does not define {attribute!r}; "
                f"it defines: {', '.join(sorted(defined)) or 'nothing'}"
            )


def _names_bound_by(body: list[ast.stmt]) -> set[str]:
    """The names that running these statements would define; ``*`` after a star import."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        else:
            names.update(
                child.id
                for child in ast.walk(node)
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            )
            for field in ("body", "orelse", "finalbody"):
                names.update(_names_bound_by(getattr(node, field, [])))
            for handler in getattr(node, "handlers", []):
                names.update(_names_bound_by(handler.body))
    return names
