"""Endless streams of training problems, and the fixed problems of an evaluation.

A source in the configuration becomes a table: problems by index, generated or read on demand.
``MixedSource`` walks through shuffled tables by weight; the order depends on nothing but the seed.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from megatron_rlsd.config import (
    CurriculumConfig,
    FileSource,
    GuessingGameSource,
    JsonlSource,
    ReasoningGymSource,
    Source,
)
from megatron_rlsd.data.curriculum import EasyQuestions, curriculum_of
from megatron_rlsd.data.guessing import GuessingProblems
from megatron_rlsd.data.gym import GymProblems
from megatron_rlsd.data.jsonl import JsonlProblems
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem


class ProblemTable(Protocol):
    """A finite collection of problems, each made or read when it is asked for."""

    name: str
    digest: str
    """The digest of the content: problems that differ, or their order, make another one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem:
        """Problem ``index`` of 0 <= index < len; the same one every time."""

    def notes(self) -> list[str]:
        """What a user should see in the log, such as skipped lines."""


class ProblemSource(Protocol):
    """An endless stream of problems that can be resumed."""

    def next(self, n: int) -> list[Problem]:
        """The next ``n`` problems."""

    def answered(self, problem: Problem, solved_share: float) -> None:
        """This share of a problem's last samples was solved; later draws may depend on it."""

    def metrics(self) -> dict[str, float]:
        """What there is to say of the stream, by name."""

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON data; its size does not grow with the position."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; UserError if it belongs to other data."""


class MixedSource:
    """Draws from several tables in proportion to their weights, each table shuffled per epoch.

    Every draw goes to the table that is furthest behind its share, so the mix of any stretch of
    the stream is exact to one problem per table, and which table comes next follows from the
    number of draws so far.
    """

    def __init__(
        self,
        tables: Sequence[ProblemTable],
        weights: Sequence[float],
        shuffle: Sequence[bool],
        seed: int,
        *,
        weights_at: Callable[[float], Sequence[float]] | None = None,
        questions_per_step: int = 1,
        easy: EasyQuestions | None = None,
        asked: Sequence[Callable[[Problem], Problem]] = (),
    ) -> None:
        """One weight (> 0) and one shuffle flag per table; at least one table.

        weights_at: in place of the weights, those at a step, where ``questions_per_step`` questions
        make one. easy: decides which turns are passed over. asked: for each
        table what becomes of its questions, see ``asked_as``.
        """
        if not tables:
            raise UserError("at least one problem source is needed")
        self._tables, self._seed = tables, seed
        self._shares = [weight / sum(weights) for weight in weights]
        self._shuffle = shuffle
        self._weights_at, self._questions_per_step = weights_at, questions_per_step
        self._easy = easy
        self._as_asked = asked or [lambda problem: problem] * len(tables)
        self._drawn = [0] * len(tables)
        """Turns of each table so far."""
        self._passed = [0] * len(tables)
        """Turns among them that were passed over, as the question was easy."""
        self._owed = [0.0] * len(tables)
        """With ``weights_at``: the sum of a table's shares over all questions so far."""
        self._orders: dict[int, tuple[int, array[int]]] = {}

    def next(self, n: int) -> list[Problem]:
        """The next ``n`` problems, from any number of epochs."""
        return [self._draw() for _ in range(n)]

    def answered(self, problem: Problem, solved_share: float) -> None:
        """See ProblemSource."""
        if self._easy is not None:
            self._easy.answered(problem, solved_share)

    def metrics(self) -> dict[str, float]:
        """See ProblemSource."""
        if self._easy is None:
            return {}
        return {
            "data/easy_questions": len(self._easy),
            "data/turns_passed_over": sum(self._passed),
        }

    def state(self) -> dict[str, Any]:
        """JSON data: the seed, and name, size, digest and draws so far of every table; what a
        schedule owes each, and the easy questions, where there are any."""
        state = self._position()
        for table, passed, owed in zip(state["tables"], self._passed, self._owed, strict=True):
            if passed:
                table["passed"] = passed
            if self._weights_at is not None:
                table["owed"] = owed
        if self._easy is not None:
            state["easy"] = self._easy.state()
        return state

    def _position(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "tables": [
                {
                    "name": table.name,
                    "size": len(table),
                    "digest": table.digest,
                    "drawn": drawn,
                }
                for table, drawn in zip(self._tables, self._drawn, strict=True)
            ],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises UserError if the seed has changed since, or a table's name, number of problems or
        content: the stream would silently be another one. Weights may change.
        """
        mine = self._position()
        identity = [(t["name"], t["size"]) for t in mine["tables"]]
        saved = [(t["name"], t["size"]) for t in state["tables"]]
        if (state["seed"], saved) != (mine["seed"], identity):
            raise UserError(
                "the saved data position belongs to other data: saved with "
                f"seed {state['seed']} over {_describe(saved)}; configured now: "
                f"seed {mine['seed']} over {_describe(identity)}"
            )
        for before, now in zip(state["tables"], mine["tables"], strict=True):
            # Release 0.1 saved no digest.
            if before.get("digest", now["digest"]) != now["digest"]:
                raise UserError(
                    f"the saved data position belongs to other data: the content of {now['name']} "
                    f"has changed since (digest {before['digest']}, now {now['digest']}): problems "
                    "were edited or stand in another order, or a generator got other settings"
                )
        self._drawn = [int(t["drawn"]) for t in state["tables"]]
        # Where nothing was passed over, as in every release before, the state does not say so.
        self._passed = [int(t.get("passed", 0)) for t in state["tables"]]
        # A schedule that is new begins without debts.
        asked = self._asked()
        self._owed = [t.get("owed", n) for t, n in zip(state["tables"], asked, strict=True)]
        if self._easy is not None and "easy" in state:
            self._easy.load_state(state["easy"])

    def notes(self) -> list[str]:
        """Log lines of all tables."""
        return [note for table in self._tables for note in table.notes()]

    def _draw(self) -> Problem:
        chosen = self._furthest_behind()
        size = len(self._tables[chosen])
        # In a table of easy questions alone one is asked all the same.
        for _ in range(size):
            problem, turn = self._take_turn(chosen)
            if self._easy is None or not self._easy.passes_over(problem, f"{chosen}/{turn}"):
                return problem
            self._passed[chosen] += 1
        problem, _ = self._take_turn(chosen)
        return problem

    def _take_turn(self, chosen: int) -> tuple[Problem, int]:
        """The table's next problem, and the number of its turn."""
        turn = self._drawn[chosen]
        epoch, offset = divmod(turn, len(self._tables[chosen]))
        problem = self._tables[chosen][self._order(chosen, epoch)[offset]]
        self._drawn[chosen] += 1
        return self._as_asked[chosen](problem), turn

    def _furthest_behind(self) -> int:
        asked = self._asked()
        position = sum(asked)
        if self._weights_at is None:
            owed = [share * (position + 1) for share in self._shares]
        else:
            weights = self._weights_at(position / self._questions_per_step)
            self._owed = owed = [
                before + weight / sum(weights)
                for before, weight in zip(self._owed, weights, strict=True)
            ]
        behind = [due - had for due, had in zip(owed, asked, strict=True)]
        return behind.index(max(behind))

    def _asked(self) -> list[int]:
        return [drawn - passed for drawn, passed in zip(self._drawn, self._passed, strict=True)]

    def _order(self, chosen: int, epoch: int) -> Sequence[int]:
        size = len(self._tables[chosen])
        if not self._shuffle[chosen]:
            return range(size)
        cached_epoch, order = self._orders.get(chosen, (-1, array("q")))
        if cached_epoch != epoch:
            order = array("q", range(size))
            random.Random(f"{self._seed}/{chosen}/{epoch}").shuffle(order)
            self._orders[chosen] = (epoch, order)
        return order


def build_sources(
    sources: Sequence[Source],
    seed: int,
    *,
    questions_per_step: int = 1,
    curriculum: CurriculumConfig | None = None,
) -> MixedSource:
    """The training stream over all configured sources.

    questions_per_step: what a step of a ``weight_schedule`` is. Raises UserError if a source cannot
    be opened (see JsonlProblems, ColumnarProblems and GymProblems).
    """
    scheduled = any(source.weight_schedule for source in sources)
    return MixedSource(
        tables=[open_table(source) for source in sources],
        weights=[source.weight for source in sources],
        shuffle=[not isinstance(source, FileSource) or source.shuffle for source in sources],
        seed=seed,
        weights_at=(lambda step: [each.weight_at(step) for each in sources]) if scheduled else None,
        questions_per_step=questions_per_step,
        easy=curriculum_of(curriculum, seed),
        asked=[asked_as(source) for source in sources],
    )


def evaluation_problems(source: Source, n: int | None) -> list[Problem]:
    """The first ``n`` problems of a source in its own order, or all it has (None, or fewer).

    Raises UserError as ``open_table`` does, and where one of them is a conversation to imitate.
    """
    table = open_table(source)
    count = len(table) if n is None else min(n, len(table))
    problems = (refuse_demonstration(table[index]) for index in range(count))
    return list(map(asked_as(source), problems))


def asked_as(source: Source) -> Callable[[Problem], Problem]:
    """A problem of the source -> the same with what its configuration says of all: variables of
    the chat template, and the environment."""
    options, environment = source.chat_template_kwargs, source.environment
    if not options and environment is None:
        return lambda problem: problem
    return partial(replace, chat_template_kwargs=options, environment=environment)


def refuse_demonstration(problem: Problem) -> Problem:
    """The same problem, one to be solved; UserError where it is a conversation to imitate."""
    if problem.demonstration:
        raise UserError(
            f"problem {problem.id} ends with the assistant's turn: a conversation to imitate, for "
            "data.train of megatron_rlsd.sft only; a problem's messages end with the user's"
        )
    return problem


def open_table(source: Source) -> ProblemTable:
    """The problems of one configured source; UserError if there are none."""
    if isinstance(source, ReasoningGymSource):
        return GymProblems(source)
    if isinstance(source, GuessingGameSource):
        return GuessingProblems(source)
    if isinstance(source, JsonlSource):
        return JsonlProblems(source)
    # Only a run that has such a source needs pyarrow.
    from megatron_rlsd.data.columnar import ColumnarProblems

    return ColumnarProblems(source)


def _describe(tables: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({size} problems)" for name, size in tables)
