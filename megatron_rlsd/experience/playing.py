"""What plays episodes: environments that answer the model, or agents that ask for its turns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from megatron_rlsd.config import SESSIONS, Config
from megatron_rlsd.data import PromptBuilder, Tokenizer
from megatron_rlsd.environments import EnvironmentPool
from megatron_rlsd.experience.episodes import STOP_SECONDS, Episodes, PlayStopped
from megatron_rlsd.rollout.engine import ResponsesDone, RolloutEngine
from megatron_rlsd.types import (
    Generation,
    GenerationRequest,
    Problem,
    SamplingParams,
    Trajectory,
)

CLOSE_SECONDS = 60.0
"""For the thread that plays to end; an environment's call in work ends by its own limit."""


class Player(Protocol):
    def wait_until_ready(self) -> None:
        """Wait until the user's code is loaded; UserError where it cannot be."""

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, labels: Sequence[str]
    ) -> list[Trajectory]:
        """``n`` trajectories of each problem, in order; see ``Episodes`` and ``Sessions``.

        labels: of each problem; with the run's seed they fix the samples.
        """


Submit = Callable[[list[GenerationRequest]], "Future[list[Generation]]"]


@contextmanager
def open_player(
    config: Config,
    prompts: PromptBuilder,
    tokenizer: Tokenizer,
    engine: RolloutEngine,
    submit: Submit | None = None,
) -> Iterator[Player | None]:
    """What ``environment`` asks for; its processes run until the block ends. None: every response
    is one turn.

    submit: as TrainerEngine has it; the player is a BackgroundPlayer then.
    """
    if not config.environment.plays:
        yield None
        return
    with ExitStack() as stack:
        stopped = threading.Event()
        if submit is not None:
            engine = _Beside(engine, submit, stopped)
        player: Player
        if config.environment.name == SESSIONS:
            # Only here: a run without agents needs no HTTP server.
            from megatron_rlsd.experience.sessions import open_sessions

            player = stack.enter_context(open_sessions(config, prompts, tokenizer, engine, stopped))
        else:
            pool = stack.enter_context(EnvironmentPool(config.environment))
            player = Episodes(config, prompts, tokenizer, engine, pool, stopped)
        if submit is not None:
            player = BackgroundPlayer(player, stopped)
            stack.callback(player.close)
        yield player


class _Beside:
    """An engine for a thread beside training: its progress is not that of the trainer's phase, and
    waiting for it ends with PlayStopped."""

    on_progress: ResponsesDone | None = None

    def __init__(self, engine: RolloutEngine, submit: Submit, stopped: threading.Event) -> None:
        self._engine, self._submit, self._stopped = engine, submit, stopped

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        found = self._submit(requests)
        while not wait([found], STOP_SECONDS).done:
            if self._stopped.is_set():
                raise PlayStopped
        return found.result()


@dataclass(frozen=True)
class _Wanted:
    """Trajectories that somebody waits for."""

    problems: list[Problem]
    n: int
    params: SamplingParams
    labels: Sequence[str]
    found: Future[list[Trajectory]]


class BackgroundPlayer:
    """A player that plays in a thread of its own, one batch of episodes after the other.

    What has been asked for meanwhile is played together next, so that the engine gets the turns of
    many episodes at once. An evaluation takes its turn.
    """

    def __init__(self, player: Player, stopped: threading.Event) -> None:
        """``stopped``: that of the player and its engine."""
        self._player, self._stopped = player, stopped
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="episodes", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        self._player.wait_until_ready()

    def play(
        self, problems: list[Problem], n: int, params: SamplingParams, labels: Sequence[str]
    ) -> list[Trajectory]:
        """See Player."""
        return self.submit(problems, n, params, labels).result()

    def submit(
        self, problems: list[Problem], n: int, params: SamplingParams, labels: Sequence[str]
    ) -> Future[list[Trajectory]]:
        """``play`` in the background; the future holds what it raises, too."""
        wanted = _Wanted(problems, n, params, labels, Future())
        self._wanted.put(wanted)
        return wanted.found

    def close(self) -> None:
        """Play no more; who still waits gets PlayStopped."""
        self._stopped.set()
        self._wanted.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (first := self._wanted.get()) is not None:
            batch, other = [first], None
            while not self._wanted.empty():
                other = self._wanted.get()
                if other is None or (other.n, other.params) != (first.n, first.params):
                    break
                batch.append(other)
                other = None
            self._play(batch)
            if other is not None:
                self._play([other])
            if self._stopped.is_set():
                return

    def _play(self, batch: list[_Wanted]) -> None:
        first = batch[0]
        problems = [problem for each in batch for problem in each.problems]
        labels = [label for each in batch for label in each.labels]
        try:
            found = iter(self._player.play(problems, first.n, first.params, labels))
        except BaseException as error:
            for each in batch:
                each.found.set_exception(error)
            return
        for each in batch:
            each.found.set_result([next(found) for _ in range(len(each.problems) * each.n)])
