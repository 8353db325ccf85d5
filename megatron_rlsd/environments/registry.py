"""Environments by name: registered ones, and users' own as ``path/to/file.py:Class``.

As with rewards the trainer only locates a class (and refuses what cannot work); a worker process
loads it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_rlsd.environments.protocol import Environment, EpisodeError
from megatron_rlsd.plugins import file_of, import_file
from megatron_rlsd.rewards.registry import names_bound_by

EnvironmentClass = Callable[..., Environment]
Registered = TypeVar("Registered", bound=EnvironmentClass)

ENVIRONMENTS: dict[str, EnvironmentClass] = {}


def register_environment(name: str) -> Callable[[Registered], Registered]:
    """Make a class known as ``name`` in ``environment.name``.

    Workers import the module that holds it: an importable one, or a file among ``plugins``. A class
    named by its path needs no registering.
    """

    def decorate(environment: Registered) -> Registered:
        if name in ENVIRONMENTS:
            raise EpisodeError(f"an environment named {name!r} is registered already")
        ENVIRONMENTS[name] = environment
        return environment

    return decorate


@dataclass(frozen=True)
class EnvironmentReference:
    """Where an environment is found; plain text, because it travels to the workers."""

    name: str
    """As configured: a registered name, or ``path/to/file.py:Class``."""
    attribute: str
    """The registered name, or the class's name in the file."""
    module: str | None = None
    """Module that registers it; None for a class named by its file."""
    path: str | None = None
    """Absolute path of the user's file that holds it; None where ``module`` can be imported."""


def locate_environment(name: str, params: dict[str, Any]) -> EnvironmentReference:
    """Find an environment without running any user code.

    Raises EpisodeError for an unknown name (listing the known ones), a missing or unparsable file,
    a class the file does not define, and params that a registered class does not take.
    """
    registered = ENVIRONMENTS.get(name)
    if registered is not None:
        if registered.__module__ == "__main__":
            raise EpisodeError(
                f"environment {name!r} is registered by the main script, which workers cannot "
                "import; name it as path/to/file.py:Class"
            )
        _check_params(name, registered, params)
        plugin = file_of(registered.__module__)
        return EnvironmentReference(
            name, name, registered.__module__, None if plugin is None else str(plugin)
        )
    path, separator, attribute = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise EpisodeError(
            f"unknown environment {name!r}; known environments: {', '.join(sorted(ENVIRONMENTS))}, "
            "or a class of your own as path/to/file.py:Class"
        )
    _check_file_defines(name, Path(path), attribute)
    return EnvironmentReference(name, attribute, path=str(Path(path).resolve()))


def load_environment(reference: EnvironmentReference, params: dict[str, Any]) -> EnvironmentClass:
    """Import the class (in a worker); whatever its module raises passes through."""
    file = None if reference.path is None else import_file(Path(reference.path))
    if reference.module is not None:
        if file is None:
            importlib.import_module(reference.module)
        return ENVIRONMENTS[reference.attribute]
    environment = getattr(file, reference.attribute)
    _check_params(reference.name, environment, params)
    missing = [n for n in ("reset", "step") if not callable(getattr(environment, n, None))]
    if missing:
        raise EpisodeError(f"environment {reference.name!r} has no method {' and '.join(missing)}")
    return environment


def _check_params(name: str, environment: EnvironmentClass, params: dict[str, Any]) -> None:
    """They fit the class's arguments, and it accepts them: it is made once."""
    signature = inspect.signature(environment)
    try:
        signature.bind(**params)
    except TypeError as error:
        raise EpisodeError(
            f"environment {name!r} cannot be made with params {params}: {error}; it takes "
            f"{signature}"
        ) from None
    try:
        environment(**params)
    except (TypeError, ValueError) as error:
        raise EpisodeError(f"environment {name!r}: {error}") from error


def _check_file_defines(name: str, path: Path, attribute: str) -> None:
    if not path.is_file():
        raise EpisodeError(f"environment {name!r}: there is no file {path.resolve()}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise EpisodeError(f"environment {name!r}: {path} is no valid Python: {error}") from error
    defined = names_bound_by(tree.body)
    # After a star import only running the file would tell; the worker will.
    if attribute not in defined and "*" not in defined:
        raise EpisodeError(
            f"environment {name!r}: {path} does not define {attribute!r}; "
            f"it defines: {', '.join(sorted(defined)) or 'nothing'}"
        )
