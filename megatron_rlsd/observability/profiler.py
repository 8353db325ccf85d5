"""torch.profiler over chosen steps."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile


class StepProfiler:
    """Profiles the chosen steps on this rank, each to ``folder``/step_000003_rank_0.json.gz."""

    def __init__(self, folder: Path, steps: Collection[int], rank: int) -> None:
        self._folder, self._steps, self._rank = folder, frozenset(steps), rank
        self._profile: profile | None = None
        self._step = -1

    def begin(self, step: int) -> None:
        """Step ``step`` starts now."""
        if step in self._steps and self._profile is None:
            import torch  # here, so that whoever only reads runs need not wait for it
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._step = step
            self._profile = profile(activities=activities)
            self._profile.start()

    def end(self) -> None:
        """The step that began is over (or the run is)."""
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{self._step:06d}_rank_{self._rank}.json.gz"
        finished.export_chrome_trace(str(self._folder / name))
