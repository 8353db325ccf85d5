"""Reward functions by name: registered ones, and users' own as ``path/to/file.py:function``.

A reward function is ``reward(sample: RewardInput, **params) -> float``. The trainer only locates
it (and refuses what cannot work); a worker process loads and calls it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlsd.plugins import file_of, import_file
from megatron_rlsd.rewards.errors import RewardError

RewardFunction = Callable[..., float]


@dataclass(frozen=True)
class RegisteredReward:
    function: RewardFunction
    imports: tuple[str, ...]
    """Modules that a worker imports before it reports ready, so that no call pays for them."""
    check: Callable[..., None] | None
    """Called with the configured params when the pool is built; raises ValueError."""


REWARDS: dict[str, RegisteredReward] = {}


def register_reward(
    name: str, *, imports: tuple[str, ...] = (), check: Callable[..., None] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Make a function known as ``name`` in ``reward.functions``.

    Workers import the module that holds it: an importable one, or a file among ``plugins``. A
    function named by its path needs no registering.
    """

    def decorate(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise RewardError(f"a reward named {name!r} is registered already")
        REWARDS[name] = RegisteredReward(function, imports, check)
        return function

    return decorate


@dataclass(frozen=True)
class RewardReference:
    """Where a reward function is found; plain text, because it travels to the workers."""

    name: str
    """As configured: a registered name, or ``path/to/file.py:function``."""
    function: str
    """The registered name, or the function's name in the file."""
    module: str | None = None
    """Module that registers it; None for a function named by its file."""
    path: str | None = None
    """Absolute path of the user's file that holds it; None where ``module`` can be imported."""


def locate_reward(name: str, params: dict[str, Any]) -> RewardReference:
    """Find a reward function without running any user code.

    Raises RewardError for an unknown name (listing the known ones), a missing or unparsable file,
    a function the file does not define, and params that a registered function does not take.
    """
    registered = REWARDS.get(name)
    if registered is not None:
        _check_params(name, registered, params)
        module = registered.function.__module__
        plugin = file_of(module)
        return RewardReference(name, name, module, None if plugin is None else str(plugin))
    path, separator, function = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise RewardError(
            f"unknown reward {name!r}; known rewards: {', '.join(sorted(REWARDS))}, "
            "or a function of your own as path/to/file.py:function"
        )
    _check_file_defines(name, Path(path), function)
    return RewardReference(name, function, path=str(Path(path).resolve()))


def load_reward(reference: RewardReference, params: dict[str, Any]) -> RewardFunction:
    """Import the function (in a worker); whatever its module raises passes through."""
    file = None if reference.path is None else import_file(Path(reference.path))
    if reference.module is not None:
        if file is None:
            importlib.import_module(reference.module)
        registered = REWARDS[reference.function]
        for module in registered.imports:
            importlib.import_module(module)
        return registered.function
    function: RewardFunction = getattr(file, reference.function)
    _bind(reference.name, function, params)
    return function


def _check_params(name: str, registered: RegisteredReward, params: dict[str, Any]) -> None:
    if registered.function.__module__ == "__main__":
        raise RewardError(
            f"reward {name!r} is registered by the main script, which workers cannot import; "
            "name it as path/to/file.py:function"
        )
    _bind(name, registered.function, params)
    if registered.check is not None:
        try:
            registered.check(**params)
        except (ValueError, TypeError) as error:
            raise RewardError(f"reward {name!r}: {error}") from error


def _bind(name: str, function: RewardFunction, params: dict[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(None, **params)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} cannot be called with params {params}: {error}; "
            f"it is {function.__name__}{signature}"
        ) from None


def _check_file_defines(name: str, path: Path, function: str) -> None:
    if not path.is_file():
        raise RewardError(f"reward {name!r}: there is no file {path.resolve()}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise RewardError(f"reward {name!r}: {path} is no valid Python: {error}") from error
    defined = names_bound_by(tree.body)
    # After a star import only running the file would tell; the worker will.
    if function not in defined and "*" not in defined:
        raise RewardError(
            f"reward {name!r}: {path} does not define {function!r}; "
            f"it defines: {', '.join(sorted(defined)) or 'nothing'}"
        )


def names_bound_by(body: list[ast.stmt]) -> set[str]:
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
                names.update(names_bound_by(getattr(node, field, [])))
            for handler in getattr(node, "handlers", []):
                names.update(names_bound_by(handler.body))
    return names
