"""A JSON file that is written after every figure, so that a run cut short leaves what it had."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "megatron-core", "transformer-engine", "transformers")


class ResultsFile:
    """Holds figures by name; ``add`` prints each and writes them all."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, dict(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, name: str, figure: Any) -> None:
        self._facts[name] = figure
        print(f"{name}: {figure}", flush=True)
        self._write()

    def _write(self) -> None:
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self._facts, indent=1) + "\n")
        os.replace(aside, self._path)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions that figures were measured with."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts
