"""Modules that have moved: users' files that import them by their old names still work in 0.2.

An old name gives the very module that lies elsewhere now, with a FutureWarning that says where
(Python shows users no DeprecationWarning of what their imported files do). Nothing in the package
itself uses an old name. Remove this module with release 0.3.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

PACKAGE = "megatron_rlsd"
MOVED = {
    "continuity": "recovery.continuity",
    "credit": "learner.credit",
    "durable": "runtime.durable",
    "engines": "weight_sync.build",
    "episodes": "experience.episodes",
    "evaluation": "experience.evaluation",
    "hf_bridge.checkpoint_keys": "conversion.checkpoint_keys",
    "hf_bridge.compare": "conversion.compare",
    "hf_bridge.convert": "conversion.convert",
    "hf_bridge.describe": "conversion.describe",
    "hf_bridge.megatron_weights": "conversion.megatron_weights",
    "hf_bridge.pickled": "conversion.pickled",
    "hf_bridge.row_runs": "conversion.row_runs",
    "hf_bridge.tokenizer_fit": "conversion.tokenizer_fit",
    "hf_bridge.torch_dist": "conversion.torch_dist",
    "lifecycle": "runtime.lifecycle",
    "noise": "learner.noise",
    "parallel.watchdog": "recovery.watchdog",
    "platform": "runtime.machine",
    "quantized": "hf_bridge.quantized",
    "recording": "recovery.recording",
    "registry": "plugins.registry",
    "replay": "recovery.replay",
    "rollout_stream": "experience.stream",
    "sample_seeds": "experience.seeds",
    "update_metrics": "learner.metrics",
}
"""Old name -> new name, both without the package's own. The former modules ``run``, ``experience``,
``learner`` and ``plugins`` are packages of the same name, which hand on what users took from them.
"""


def keep_old_names() -> None:
    """Let the old names be imported; nothing is loaded before one of them is."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        # First, because an updated clone may keep an old folder with nothing but __pycache__ in it,
        # which would count as a package.
        sys.meta_path.insert(0, _MovedFinder())


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"{PACKAGE}.{MOVED[old.removeprefix(PACKAGE + '.')]}"
        warnings.warn(
            f"{old} is {new} now; the old name goes with release 0.3",
            FutureWarning,
            stacklevel=2,
        )
        # What stands here when this returns is what the import statement gets.
        sys.modules[old] = importlib.import_module(new)
