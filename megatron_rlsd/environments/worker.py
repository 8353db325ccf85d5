"""An environment worker: ``python -m megatron_rlsd.environments.worker``, started by the pool only.

A job is one call {batch, episode, problem, turns, answers}: answer the last of ``turns``, or begin
if there is none. ``answers``: the opening and what was answered to the turns before. It tells its
progress for each turn that it plays again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_rlsd.environments.protocol import Environment, Observation
from megatron_rlsd.environments.registry import ENVIRONMENTS
from megatron_rlsd.plugins import Reference
from megatron_rlsd.workers import Calls, StillAlive, problem_of, serve


class NotAnAnswer(TypeError):
    """What the environment returned is not an opening, or not an answer."""


@dataclass
class OpenEpisode:
    environment: Environment
    steps: int


class OpenEpisodes:
    """The episodes under way in this process."""

    def __init__(self, classes: dict[str, Callable[[], Environment]]) -> None:
        """classes: by the ``environment`` of a problem, "" for None."""
        self._classes = classes
        self._batch: int | None = None
        self._episodes: dict[int, OpenEpisode] = {}

    def answer(self, call: dict[str, Any], progress: StillAlive) -> Observation:
        """The opening, or the answer to the last turn; what the environment raises passes through.

        An episode that this process does not know, or not so far, is played again up to here.
        """
        if call["batch"] != self._batch:
            self._batch = call["batch"]
            self._episodes.clear()
        turns, number = call["turns"], call["episode"]
        episode = self._episodes.pop(number, None)
        if not turns:
            episode, opening = self._begin(call)
            self._episodes[number] = episode
            return Observation(text=opening)
        if episode is None or episode.steps != len(turns) - 1:
            episode = self._replay(call, progress)
        observation = checked(episode.environment.step(turns[-1]))
        episode.steps += 1
        if not observation.done:
            self._episodes[number] = episode
        return observation

    def _begin(self, call: dict[str, Any]) -> tuple[OpenEpisode, str]:
        problem = problem_of(call)
        environment = self._classes[problem.environment or ""]()
        opening = environment.reset(problem)
        if opening is None:
            opening = ""
        if not isinstance(opening, str):
            raise NotAnAnswer(f"reset returned {opening!r:.80}, which is not text and not None")
        opening.encode()
        return OpenEpisode(environment, 0), opening

    def _replay(self, call: dict[str, Any], progress: StillAlive) -> OpenEpisode:
        episode, text = self._begin(call)
        for number, (turn, given) in enumerate(zip(call["turns"], call["answers"], strict=True)):
            if text != given:
                raise NotAnAnswer(
                    f"played again it says {text!r:.80} where it said {given!r:.80}: its answers "
                    "must follow from the problem and the turns alone"
                )
            if number == len(call["turns"]) - 1:
                break
            progress()
            text = checked(episode.environment.step(turn)).text
            episode.steps += 1
        return episode


def checked(answer: Any) -> Observation:
    """An answer of a user's ``step``; NotAnAnswer or ValueError that says what is wrong with it."""
    if isinstance(answer, str):
        answer = Observation(text=answer)
    if not isinstance(answer, Observation):
        raise NotAnAnswer(f"step returned {answer!r:.80}, which is neither an Observation nor text")
    if not isinstance(answer.text, str):
        raise NotAnAnswer(f"step returned the text {answer.text!r:.80}, which is none")
    answer.text.encode()  # half a surrogate pair has no tokens
    if isinstance(answer.reward, str | bytes) or not hasattr(answer.reward, "__float__"):
        raise NotAnAnswer(f"step returned the reward {answer.reward!r:.80}, which is not a number")
    reward = float(answer.reward)
    if not math.isfinite(reward):
        raise ValueError(f"step returned the reward {reward}, which is not a finite number")
    return Observation(answer.text, bool(answer.done), reward)


def load(setup: dict[str, Any]) -> Calls:
    classes: dict[str, Callable[[], Environment]] = {}
    for key, told in setup["environments"].items():
        code = ENVIRONMENTS.load(Reference(**told["reference"]), told["params"])
        classes[key] = partial(code, **told["params"])
    player = OpenEpisodes(classes)

    def calls(request: dict[str, Any], progress: StillAlive) -> list[Callable[[], dict[str, Any]]]:
        return [lambda: vars(player.answer(request, progress))]

    return calls


if __name__ == "__main__":
    sys.exit(serve(load))
