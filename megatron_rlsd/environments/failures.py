"""Episodes that fail: what each ends with, and when they are too many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_rlsd.runtime.errors import UserError

if TYPE_CHECKING:  # a worker imports this package too, and has no use for pydantic
    from megatron_rlsd.config import EnvironmentConfig


@dataclass
class Failures:
    """Those of the episodes that are played together."""

    config: EnvironmentConfig
    episodes: int
    """All that are played, failed or not."""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str, detail: str, timed_out: bool) -> None:
        """Count one; raises UserError where the configuration says to stop.

        where: names the problem and the turn; detail: lines for whoever has to mend it.
        """
        config = self.config
        where = f"environment {config.name!r}, {where}"
        example = "".join(f"\n    {line}" for line in detail.strip().splitlines())
        if config.on_error == "stop" and not timed_out:
            raise UserError(f"{where}: {reason}{example}")
        self.reasons[reason] += 1
        failed = self.reasons.total()
        if failed > config.max_error_share * self.episodes:
            most_frequent, count = self.reasons.most_common(1)[0]
            raise UserError(
                f"{failed} of {self.episodes} episodes have failed, more than "
                f"environment.max_error_share={config.max_error_share:g} allows; most "
                f"frequent ({count} times): {most_frequent}; the last: {where}: {reason}{example}"
            )
