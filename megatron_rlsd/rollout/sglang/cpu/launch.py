"""Start an SGLang server on a machine without a GPU.

    PYTHON_OF_SGLANG launch.py --model-path DIR ... (arguments of sglang.launch_server)

Run by path in SGLang's own environment: ``sys.path`` then begins with this folder, where the kernel
stand-in lies. SGLang's worker processes are spawned, inherit that path and import this file again,
so the preparation below reaches each of them.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

TESTED_VERSION = "0.5.23"


def prepare() -> None:
    """Make ``import sglang`` work without CUDA; exit with the reason for an untested version."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != TESTED_VERSION:
        sys.exit(
            f"the CPU server is tested with sglang {TESTED_VERSION} only, and the environment of "
            f"{sys.executable} has {found}; run `make sglang-cpu` or set rollout.sglang.python"
        )
    # Workers read the server's arguments, some of which are of a type that is defined there.
    sys.path.insert(1, str(Path(__file__).parents[1] / "launch"))
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    _declare_torchvision_operators()
    if "--enable-deterministic-inference" in sys.argv:
        import seeded_sampling

        seeded_sampling.enable()
    if "--enable-return-routed-experts" in sys.argv:
        import routed_experts

        routed_experts.enable()


def _declare_torchvision_operators() -> None:
    """Signatures that torchvision's Python code refers to at import.

    Its compiled operators are built for another torch, so they do not load; text models call none.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The declarations live as long as the object.
    globals()["_torchvision_operators"] = library


prepare()

if __name__ == "__main__":
    import hidden_flags

    hidden_flags.take()
    runpy.run_module("sglang.launch_server", run_name="__main__")
