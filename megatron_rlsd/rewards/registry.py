"""Reward functions by name: registered ones, and users' own as ``path/to/file.py:function``.

A reward function is ``reward(sample: RewardInput, **params) -> float``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_rlsd.plugins import Registered, Registry
from megatron_rlsd.runtime.errors import UserError

RewardFunction = Callable[..., float]


def _check_params(name: str, function: RewardFunction, params: dict[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(None, **params)
    except TypeError as error:
        raise UserError(
            f"reward {name!r} cannot be called with params {params}: {error}; "
            f"it is {function.__name__}{signature}"
        ) from None


REWARDS: Registry[RewardFunction] = Registry("a reward", one="function", check=_check_params)


def register_reward(
    name: str, *, imports: tuple[str, ...] = (), check: Callable[..., None] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Make a function known as ``name`` in ``reward.functions``.

    Workers import the module that holds it: an importable one, or a file among ``plugins``, and
    ``imports`` besides. ``check`` is called with the configured params when the pool is built and
    raises ValueError. A function named by its path needs no registering.
    """

    def decorate(function: RewardFunction) -> RewardFunction:
        REWARDS.add(name, Registered(function, imports, check))
        return function

    return decorate
