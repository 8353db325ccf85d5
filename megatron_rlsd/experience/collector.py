"""Collects training batches: one protocol, two ways to follow it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from megatron_rlsd.config import Config
from megatron_rlsd.experience.arriving import Submits
from megatron_rlsd.experience.groups import GroupBuilder
from megatron_rlsd.experience.playing import BackgroundPlayer
from megatron_rlsd.experience.questions import Questions
from megatron_rlsd.experience.rules import Collected
from megatron_rlsd.experience.stream import StreamCollector
from megatron_rlsd.experience.synchronous import StepCollector
from megatron_rlsd.types import Group


class Collector(Protocol):
    """Brings the groups of each training step; on rank 0.

    Both ways draw from the same Questions, build with the same GroupBuilder and finish with the
    same BatchRules, so that a rule of one is a rule of the other.
    """

    def published(self, version: int) -> None:
        """The engine samples with the weights after ``version`` steps from now on."""

    def collect(self, step: int) -> Collected:
        """``rollout.prompts_per_step`` groups for step ``step`` with rewards, the teacher's prompts
        and advantages; and metrics of them.

        Raises UserError where too few questions fit, none has the critique that is to be the
        hint, rewards fail too often, or no response has a token; EngineError.
        """

    def arriving(self, step: int) -> Generator[list[Group], None, Collected]:
        """Bring ``collect``'s groups, each as soon as it is known to be of the batch, if only some
        are known before the last; what ``collect`` returns is the generator's result."""

    def state(self) -> dict[str, Any]:
        """JSON data to go on from: the data position, and the questions under way."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; UserError if it belongs to other data."""

    def close(self) -> None:
        """Ask for no more."""


def build_collector(
    config: Config,
    questions: Questions,
    builder: GroupBuilder,
    engine: Submits,
    span: Callable[[str, int, int, int, int], None],
    count: Callable[[int, int, str], None],
    *,
    beside_training: bool,
    player: BackgroundPlayer | None = None,
) -> Collector:
    """What ``rollout.asynchronous`` asks for.

    ``span``, ``count`` and ``player``: as for StreamCollector.
    ``beside_training`` False: nothing is trained, so that there is nothing to sample beside.
    """
    if beside_training and config.rollout.asynchronous.max_staleness:
        return StreamCollector(config, questions, builder, engine, span, count, player)
    return StepCollector(config, questions, builder, engine, count)
