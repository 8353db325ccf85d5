"""Environments by name: registered ones, and users' own as ``path/to/file.py:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_rlsd.environments.protocol import Environment
from megatron_rlsd.plugins import Registered, Registry
from megatron_rlsd.runtime.errors import UserError

EnvironmentClass = Callable[..., Environment]
Class = TypeVar("Class", bound=EnvironmentClass)


def _check_class(name: str, environment: EnvironmentClass, params: dict[str, Any]) -> None:
    """Params fit its arguments, and it accepts them: it is made once."""
    signature = inspect.signature(environment)
    try:
        signature.bind(**params)
    except TypeError as error:
        raise UserError(
            f"environment {name!r} cannot be made with params {params}: {error}; it takes "
            f"{signature}"
        ) from None
    try:
        environment(**params)
    except (TypeError, ValueError) as error:
        raise UserError(f"environment {name!r}: {error}") from error
    missing = [n for n in ("reset", "step") if not callable(getattr(environment, n, None))]
    if missing:
        raise UserError(f"environment {name!r} has no method {' and '.join(missing)}")


ENVIRONMENTS: Registry[EnvironmentClass] = Registry(
    "an environment", one="Class", check=_check_class
)


def register_environment(name: str) -> Callable[[Class], Class]:
    """Make a class known as ``name`` in ``environment.name``.

    Workers import the module that holds it: an importable one, or a file among ``plugins``. A class
    named by its path needs no registering.
    """

    def decorate(environment: Class) -> Class:
        ENVIRONMENTS.add(name, Registered(environment))
        return environment

    return decorate
