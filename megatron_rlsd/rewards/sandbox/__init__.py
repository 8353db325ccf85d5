"""Runs strangers' Python programs where they can do no harm, and see no tests."""

from megatron_rlsd.rewards.sandbox.launch import Limits, Sandbox, SandboxFailed, Unavailable
from megatron_rlsd.rewards.sandbox.relay import passed_asserts
from megatron_rlsd.rewards.sandbox.run import output_of

__all__ = [
    "Limits",
    "Sandbox",
    "SandboxFailed",
    "Unavailable",
    "output_of",
    "passed_asserts",
]
