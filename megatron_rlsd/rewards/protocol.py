"""The JSON lines between the pool and a worker: no pickle, one object a line.

pool -> worker:  setup {functions, memory_limit_bytes}, then jobs {job, function, sample}: call
                 the functions from number ``function`` on, in order.
worker -> pool:  {"ready": true} or {"fatal": traceback}; then for each call
                 {job, function, value} or {job, function, error, detail, timed_out, retire}.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_rlsd.rewards.registry import RewardReference
from megatron_rlsd.types import Problem, RewardInput


def encode(message: dict[str, Any]) -> bytes:
    """One line; ASCII, so that neither line breaks nor lone surrogates of a response disturb it."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def encode_setup(
    functions: list[tuple[RewardReference, dict[str, Any]]], memory_limit_bytes: int
) -> bytes:
    described = [{**asdict(reference), "params": params} for reference, params in functions]
    return encode({"functions": described, "memory_limit_bytes": memory_limit_bytes})


def decode_functions(setup: dict[str, Any]) -> list[tuple[RewardReference, dict[str, Any]]]:
    functions = []
    for described in setup["functions"]:
        params = described.pop("params")
        functions.append((RewardReference(**described), params))
    return functions


def encode_job(job: int, function: int, sample: RewardInput) -> bytes:
    """Raises TypeError or ValueError where the problem's metadata is no JSON."""
    fields = {**vars(sample), "problem": vars(sample.problem)}
    return encode({"job": job, "function": function, "sample": fields})


def decode_sample(fields: dict[str, Any]) -> RewardInput:
    problem = fields.pop("problem")
    messages = tuple(problem.pop("messages"))
    transcript = tuple(fields.pop("transcript"))
    problem = Problem(messages=messages, **problem)
    return RewardInput(problem=problem, transcript=transcript, **fields)
