"""An environment worker: ``python -m megatron_rlsd.environments.worker``, started by the pool only.

JSON lines, one object a line.
pool -> worker:  setup {reference, params, memory_limit_bytes}, then calls {call, batch, episode,
                 problem, turns, answers}: answer the last of ``turns``, or begin if there is none.
                 ``answers``: the opening and what was answered to the turns before.
worker -> pool:  {"ready": true} or {"fatal": traceback}; then for each call {call, replayed} for
                 each turn played again, and last {call, text, done, reward} or
                 {call, error, detail, retire}.
"""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rlsd.environments.protocol import Environment, Observation
from megatron_rlsd.environments.registry import (
    EnvironmentClass,
    EnvironmentReference,
    load_environment,
)
from megatron_rlsd.rewards.protocol import encode
from megatron_rlsd.rewards.worker import (
    MAX_DETAIL_CHARS,
    MAX_REASON_CHARS,
    claim_standard_streams,
    die_with_parent,
    leave_signals_to_parent,
    limit_resources,
)
from megatron_rlsd.types import Problem

Send = Callable[[dict[str, Any]], None]


class NotAnAnswer(TypeError):
    """What the environment returned is no opening, or no answer."""


@dataclass
class Episode:
    environment: Environment
    steps: int


class Player:
    """The episodes under way in this process."""

    def __init__(self, environment: EnvironmentClass, params: dict[str, Any]) -> None:
        self._environment, self._params = environment, params
        self._batch: int | None = None
        self._episodes: dict[int, Episode] = {}

    def answer(self, call: dict[str, Any], replayed: Callable[[int], None]) -> Observation:
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
            episode = self._replay(call, replayed)
        observation = checked(episode.environment.step(turns[-1]))
        episode.steps += 1
        if not observation.done:
            self._episodes[number] = episode
        return observation

    def _begin(self, call: dict[str, Any]) -> tuple[Episode, str]:
        fields = call["problem"]
        problem = Problem(**{**fields, "messages": tuple(fields["messages"])})
        environment = self._environment(**self._params)
        opening = environment.reset(problem)
        if opening is None:
            opening = ""
        if not isinstance(opening, str):
            raise NotAnAnswer(f"reset returned {opening!r:.80}, which is no text and not None")
        opening.encode()
        return Episode(environment, 0), opening

    def _replay(self, call: dict[str, Any], replayed: Callable[[int], None]) -> Episode:
        episode, text = self._begin(call)
        for number, (turn, given) in enumerate(zip(call["turns"], call["answers"], strict=True)):
            if text != given:
                raise NotAnAnswer(
                    f"played again it says {text!r:.80} where it said {given!r:.80}: its answers "
                    "must follow from the problem and the turns alone"
                )
            if number == len(call["turns"]) - 1:
                break
            replayed(number)
            text = checked(episode.environment.step(turn)).text
            episode.steps += 1
        return episode


def checked(answer: Any) -> Observation:
    """An answer of a user's ``step``; NotAnAnswer or ValueError that says what is wrong with it."""
    if isinstance(answer, str):
        answer = Observation(text=answer)
    if not isinstance(answer, Observation):
        raise NotAnAnswer(f"step returned {answer!r:.80}, which is no Observation and no text")
    if not isinstance(answer.text, str):
        raise NotAnAnswer(f"step returned the text {answer.text!r:.80}, which is none")
    answer.text.encode()  # half a surrogate pair has no tokens
    if isinstance(answer.reward, str | bytes) or not hasattr(answer.reward, "__float__"):
        raise NotAnAnswer(f"step returned the reward {answer.reward!r:.80}, which is no number")
    reward = float(answer.reward)
    if not math.isfinite(reward):
        raise ValueError(f"step returned the reward {reward}, which is no finite number")
    return Observation(answer.text, bool(answer.done), reward)


def main() -> int:
    leave_signals_to_parent()
    die_with_parent()
    requests, replies = claim_standard_streams()
    faulthandler.enable()

    def send(message: dict[str, Any]) -> None:
        replies.write(encode(message))
        replies.flush()

    setup = json.loads(requests.readline())
    limit_resources(setup["memory_limit_bytes"])
    try:
        reference = EnvironmentReference(**setup["reference"])
        player = Player(load_environment(reference, setup["params"]), setup["params"])
    except BaseException:
        send({"fatal": traceback.format_exc()[-MAX_DETAIL_CHARS:]})
        return 1
    send({"ready": True})
    for line in requests:
        if not serve(json.loads(line), player, send):
            return 0
    return 0


def serve(call: dict[str, Any], player: Player, send: Send) -> bool:
    """Answer one call; whatever it raises becomes data. False: this process should be replaced."""
    number = call["call"]
    try:
        found = player.answer(call, lambda turn: send({"call": number, "replayed": turn}))
        reply = {"text": found.text, "done": found.done, "reward": found.reward}
    except BaseException as error:
        reply = {
            "error": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS],
            "detail": "".join(traceback.format_exception(error, limit=-8))[-MAX_DETAIL_CHARS:],
            # What filled the memory may still be referenced: later calls would fail in its place.
            "retire": isinstance(error, MemoryError),
        }
    send({"call": number, **reply})
    return not reply.get("retire")


if __name__ == "__main__":
    sys.exit(main())
