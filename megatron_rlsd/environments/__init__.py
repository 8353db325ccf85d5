"""What answers the model between its turns: by name or by file, in worker processes."""

from megatron_rlsd.environments import calculator, guessing_game
from megatron_rlsd.environments.pool import Call, EnvironmentPool, Failure
from megatron_rlsd.environments.protocol import Environment, Observation
from megatron_rlsd.environments.registry import ENVIRONMENTS, register_environment

__all__ = [
    "ENVIRONMENTS",
    "Call",
    "Environment",
    "EnvironmentPool",
    "Failure",
    "Observation",
    "calculator",
    "guessing_game",
    "register_environment",
]
