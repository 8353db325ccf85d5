"""Installed versions against those that this program was tested with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis.check import Check, Doubt, Skip, run_check
from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON, on_cpu
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.megatron_versions import SUPPORTED as MEGATRON
from megatron_rlsd.runtime.releases import release

Version = tuple[int, ...]
SMI_SECONDS = 30.0
PYTHON_SECONDS = 60.0


@dataclass(frozen=True)
class Range:
    """From ``low`` on, and below ``high`` where there is a limit."""

    low: Version
    high: Version | None = None

    def __contains__(self, found: Version) -> bool:
        return self.low <= found and (self.high is None or found < self.high)

    def __str__(self) -> str:
        text = f">= {_text(self.low)}"
        return text if self.high is None else f"{text}, < {_text(self.high)}"


MATRIX = {
    "python": Range((3, 11), (3, 13)),
    "torch": Range((2, 6)),
    "megatron-core": Range(*MEGATRON),
    "transformers": Range((4, 51)),
    "transformer-engine": Range((2, 8)),
    "triton": Range((3, 0)),
    "cuda": Range((12, 1)),
    "driver": Range((535,)),
    "sglang": Range((0, 5, 10)),
}
"""What pyproject.toml asks for, and for the others what the program was written against."""
PACKAGES = ("torch", "megatron-core", "transformers", "triton", "transformer-engine", "apex")
OPTIONAL = {
    "transformer-engine": "the local layers are used",
    "triton": "the fused head runs on plain torch",
    "apex": "norms and Adam are torch's",
}


def version_checks() -> Iterator[Check]:
    """Check the versions of everything but SGLang's packages."""
    yield run_check("version of python", check_python)
    for name in PACKAGES:
        yield run_check(f"version of {name}", partial(check_package, name))
    yield run_check("driver and CUDA", check_driver)


def check_python() -> str:
    return _expect("python", _text(sys.version_info[:3]))


def check_package(name: str) -> str:
    try:
        found = version(name)
    except PackageNotFoundError:
        if name in OPTIONAL:
            raise Skip(f"not installed: {OPTIONAL[name]}") from None
        raise UserError(f"{name} is not installed; expected {MATRIX[name]}") from None
    return found if name not in MATRIX else _expect(name, found)


def check_driver() -> str:
    """The NVIDIA driver and the CUDA release that torch was built for."""
    built = torch.version.cuda
    if built is None:
        raise Skip("torch was built without CUDA: runs go over gloo on the CPU")
    _expect("cuda", built)
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            check=True,
        )
    except FileNotFoundError:
        raise UserError(f"torch was built for CUDA {built} but there is no nvidia-smi") from None
    except (subprocess.SubprocessError, OSError) as error:
        raise UserError(f"nvidia-smi does not answer: {error}") from error
    driver = _expect("driver", answer.stdout.split("\n", 1)[0].strip())
    if not torch.cuda.is_available():
        raise UserError(f"driver {driver}, torch for CUDA {built}, but torch finds no usable GPU")
    return f"driver {driver}, CUDA {built}"


def check_sglang(config: Config) -> str:
    """The environment that servers would be started from; asked without importing SGLang."""
    settings = config.rollout.sglang
    if config.rollout.engine != "sglang":
        raise Skip("rollout.engine is not sglang")
    if settings.urls:
        raise Skip("rollout.sglang.urls names servers that run already")
    python = Path(settings.python) if settings.python else PROJECT_PYTHON
    if not python.is_file():
        raise UserError(
            f"no SGLang environment: {python} does not exist; run `make sglang-cpu`, or set "
            "rollout.sglang.python or rollout.sglang.urls"
        )
    code = (
        "import importlib.metadata as m, importlib.util as u, json; print(json.dumps("
        "{'sglang': m.version('sglang'), 'torch': m.version('torch'), "
        "'saver': bool(u.find_spec('torch_memory_saver'))} "
        "if u.find_spec('sglang') else {}))"
    )
    try:
        answer = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=PYTHON_SECONDS
        )
        found = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{python} is not a usable Python: {error}") from error
    if not found:
        raise UserError(f"{python} has no package sglang")
    if config.rollout.colocated and not found["saver"] and not on_cpu(settings):
        raise UserError(
            f"{python} has no package torch_memory_saver, with which colocated servers give their "
            "memory back (rollout.colocated)"
        )
    return f"sglang {_expect('sglang', found['sglang'])}, torch {found['torch']}"


def _expect(name: str, found: str) -> str:
    try:
        supported = release(found) in MATRIX[name]
    except ValueError:
        raise Doubt(f"{name} {found!r} is not a version number; expected {MATRIX[name]}") from None
    if not supported:
        raise UserError(f"{name} {found} is not supported; expected {MATRIX[name]}")
    return found


def _text(numbers: Version) -> str:
    return ".".join(map(str, numbers))
