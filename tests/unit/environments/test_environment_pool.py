"""Every way in which an environment can fail, with real worker processes and short limits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import EnvironmentConfig
from megatron_rlsd.environments import Call, EnvironmentPool, Failure, Observation
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

pytestmark = pytest.mark.process

PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "1", metadata={"start": 3})

# The turn says what the environment is to do.
MISBEHAVING = """
import os, time
from megatron_rlsd.environments import Observation

STARTS = 0

class Adder:
    def __init__(self, scale=1):
        self.scale = scale

    def reset(self, problem):
        global STARTS
        STARTS += 1
        self.total, self.steps = problem.metadata["start"], 0
        return problem.metadata.get("opening", f"from {self.total}")

    def step(self, response):
        self.steps += 1
        if response == "sleep": time.sleep(1e9)
        if response == "spin in C": len(str(9 ** (9 ** 9)))
        if response == "die": os._exit(3)
        if response == "memory": bytearray(1 << 34)
        if response == "raise": raise KeyError("missing thing")
        if response == "leave": raise SystemExit("leaving")
        if response == "pid": return str(os.getpid())
        if response == "steps": return f"{self.steps} of {STARTS}"
        if response == "time": return str(time.time_ns())
        if response == "done": return Observation("over", done=True, reward=self.total)
        garbage = {"none": None, "number": 7, "pair": ("a", False), "half": "\\ud800",
                   "nan": Observation("", reward=float("nan")), "not text": Observation(3),
                   "no number": Observation("", reward="1")}
        if response in garbage: return garbage[response]
        self.total += self.scale * int(response)
        return Observation(str(self.total), reward=1)

class NoStep:
    def reset(self, problem): pass
"""

FAILURES = {
    "sleep": "took longer than 1 s",
    "spin in C": "took longer than 1 s",
    "die": "its worker process died (exit code 3)",
    "memory": "MemoryError",
    "raise": "KeyError: 'missing thing'",
    "leave": "SystemExit: leaving",
    "none": "step returned None, which is neither an Observation nor text",
    "number": "step returned 7, which",
    "pair": "step returned ('a', False), which",
    "half": "UnicodeEncodeError",
    "nan": "the reward nan, which is not a finite number",
    "not text": "the text 3, which is none",
    "no number": "the reward '1', which is not a number",
}

Make = Callable[..., EnvironmentPool]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "adder.py").write_text(MISBEHAVING)
    pools = []

    def build(name: str = "Adder", **settings: Any) -> EnvironmentPool:
        config = {"workers": 1, "timeout_seconds": 1, "max_error_share": 1, **settings}
        pool = EnvironmentPool(EnvironmentConfig(name=f"{tmp_path}/adder.py:{name}", **config))
        pools.append(pool)
        return pool

    yield build
    for pool in pools:
        pool.close()


class Game:
    """Episodes of a pool, played from the caller's side."""

    def __init__(self, pool: EnvironmentPool, episodes: int, **metadata: Any) -> None:
        self.pool = pool
        self.problem = Problem("p", PROBLEM.messages, "1", metadata={"start": 3, **metadata})
        pool.begin(episodes)
        calls = [Call(i, self.problem, [], []) for i in range(episodes)]
        self.openings = pool.answer(calls)
        self.turns: list[list[str]] = [[] for _ in range(episodes)]
        self.answers = [[getattr(o, "text", "")] for o in self.openings]

    def step(self, **turns: str) -> dict[str, Observation | Failure]:
        """e0="1", e1="2": the next turns of some episodes."""
        numbers = [int(name[1:]) for name in turns]
        for number, turn in zip(numbers, turns.values(), strict=True):
            self.turns[number].append(turn)
        replies = self.pool.answer(
            [Call(i, self.problem, self.turns[i], self.answers[i]) for i in numbers]
        )
        for number, reply in zip(numbers, replies, strict=True):
            self.answers[number].append(getattr(reply, "text", ""))
        return dict(zip(turns, replies, strict=True))


def test_episodes_keep_their_own_state_and_a_new_batch_forgets_them(make):
    pool = make(workers=2, params={"scale": 2})
    game = Game(pool, 3)
    assert game.openings == [Observation("from 3")] * 3
    game.step(e0="1", e2="10")
    assert game.step(e0="1", e1="5", e2="0") == {
        "e0": Observation("7", reward=1.0),
        "e1": Observation("13", reward=1.0),
        "e2": Observation("23", reward=1.0),
    }
    assert game.step(e2="done") == {"e2": Observation("over", done=True, reward=23.0)}
    assert Game(pool, 1).step(e0="done") == {"e0": Observation("over", done=True, reward=3.0)}
    # Nobody was replaced, nor played again: the first worker has started episodes 0, 2 and 0.
    assert Game(pool, 1).step(e0="steps") == {"e0": Observation("1 of 4")}


def test_every_failure_ends_its_own_episode_only_and_is_named(make):
    game = Game(make(), len(FAILURES) + 1)
    last = f"e{len(FAILURES)}"
    game.step(**{last: "4"})
    found = game.step(**{f"e{i}": what for i, what in enumerate(FAILURES)}, **{last: "4"})
    assert found[last] == Observation("11", reward=1.0)
    for (what, reason), reply in zip(FAILURES.items(), found.values(), strict=False):
        assert isinstance(reply, Failure), what
        assert reply.reason.startswith("turn 1: ")
        assert reason in reply.reason, what


def test_a_failing_reset_is_named(make):
    pool = make()
    opened = Game(pool, 1, opening=5).openings[0]
    assert isinstance(opened, Failure)
    assert opened.reason.startswith("reset: NotAnAnswer: reset ret")
    played = Game(pool, 1, start=None).step(e0="1")["e0"]
    assert isinstance(played, Failure)
    assert played.reason.startswith("turn 1: TypeError")


def test_an_episode_lives_on_in_another_worker_if_it_can_be_played_again(make):
    game = Game(make(), 3)
    game.step(e0="1", e1="2", e2="time")
    game.step(e0="1")
    assert isinstance(game.step(e1="die")["e1"], Failure)
    assert game.step(e0="1") == {"e0": Observation("6", reward=1.0)}
    assert game.step(e0="steps") == {"e0": Observation("4 of 1")}
    broken = game.step(e2="1")["e2"]
    assert isinstance(broken, Failure)
    assert "played again it says" in broken.reason
    assert "from the problem and the turns alone" in broken.reason


def test_a_worker_that_died_between_turns_is_replaced_without_blame(make):
    pool = make()
    game = Game(pool, 1)
    game.step(e0="1")
    os.kill(pool._workers[0].pid, signal.SIGKILL)
    time.sleep(0.2)
    assert game.step(e0="1") == {"e0": Observation("5", reward=1.0)}


def test_a_hanging_call_takes_no_longer_than_its_limit_and_leaves_no_process(make):
    pool = make()
    game = Game(pool, 2)
    told = game.step(e0="pid")["e0"]
    assert isinstance(told, Observation)
    worker = int(told.text)
    began = time.monotonic()
    assert isinstance(game.step(e1="sleep")["e1"], Failure)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_too_many_failures_stop_the_run_with_the_most_frequent_reason(make):
    game = Game(make(max_error_share=0.5), 4)
    game.step(e0="raise")
    with pytest.raises(
        UserError, match=r"(?s)3 of 4 episodes.*2 times.*missing thing.*SystemExit: leaving"
    ):
        game.step(e1="raise", e2="leave")
    strict = Game(make(on_error="stop"), 2)
    assert isinstance(strict.step(e0="sleep")["e0"], Failure)
    with pytest.raises(UserError, match=r"(?s)Adder', problem 'p', turn 1: KeyError.*in step"):
        strict.step(e1="raise")


def test_what_cannot_work_is_refused_before_anything_runs(make, tmp_path):
    with pytest.raises(UserError, match="does not define 'Ader'; it defines: Adder, NoStep"):
        make("Ader")
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.py"):
        EnvironmentPool(EnvironmentConfig(name=f"{tmp_path}/nowhere.py:A"))
    with pytest.raises(UserError, match=r"(?s)could not load.*has no method step"):
        make("NoStep").wait_until_ready()
    with pytest.raises(UserError, match=r"(?s)could not load.*cannot be made with params"):
        make(params={"size": 2}).wait_until_ready()
    with pytest.raises(UserError, match="metadata must be plain JSON data"):
        Game(make(), 1, odd={1, 2})
