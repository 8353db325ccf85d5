"""Conversations to imitate: a player written in code plays the environment of a configuration.

    python -m examples.experiments.scripted_play CONFIG.yaml OUT.jsonl [--games N] [--noise X]
        [--privileged SHARE]

Each line is one game over a problem of ``data.train``, won or lost, as megatron_rlsd.sft reads it.
A share of the games is played by a player who has seen the reference solution: without noise, and
to be imitated under the privileged prompt, so that a teacher learns to use its hint.
The players know the two shipped environments, with answers written as ``#### 5``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.data import build_sources
from megatron_rlsd.environments.calculator import Calculator
from megatron_rlsd.environments.guessing_game import GuessingGame
from megatron_rlsd.experience.episodes import with_opening
from megatron_rlsd.types import Problem

Player = Generator[str, str, None]
"""Yields its turns and is sent what the environment answered to each."""


def guesses(problem: Problem, chance: random.Random, noise: float) -> Player:
    """Halves what is left; with probability ``noise`` guesses any number of it."""
    game = problem.metadata["guessing_game"]
    low, high = game["low"], game["high"]
    while True:
        guess = chance.randint(low, high) if chance.random() < noise else (low + high) // 2
        answer = yield f"#### {guess}"
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)


def calculates(problem: Problem, chance: random.Random, noise: float) -> Player:
    """Asks for one operation of the worked solution after the other; with probability ``noise``
    works one out alone."""
    if problem.reference_solution is None:
        raise SystemExit(f"problem {problem.id} has no worked solution to play by")
    result = problem.answer
    for step in problem.reference_solution.splitlines():
        operation, _, result = step.partition(" = ")
        if chance.random() >= noise:
            result = yield f"<calc>{operation}</calc>"
    yield f"#### {result}"


PLAYERS: dict[str, Callable[[Problem, random.Random, float], Player]] = {
    "calculator": calculates,
    "guessing_game": guesses,
}
ENVIRONMENTS: dict[str, Callable[..., Calculator | GuessingGame]] = {
    "calculator": Calculator,
    "guessing_game": GuessingGame,
}


def play(
    config: Config, problem: Problem, chance: random.Random, noise: float, privileged: bool = False
) -> tuple[dict[str, Any], float]:
    """One game as a line of data, and its reward."""
    name, settings = str(config.environment.name), config.environment
    environment = ENVIRONMENTS[name](**settings.params)
    problem = with_opening(problem, environment.reset(problem) or "")
    player = PLAYERS[name](problem, chance, 0.0 if privileged else noise)
    messages, reward, turn = list(problem.messages), 0.0, next(player)
    for number in range(1, settings.max_turns + 1):
        messages.append({"role": "assistant", "content": turn})
        observation = environment.step(turn)
        reward += observation.reward
        if observation.done or number == settings.max_turns:
            break
        messages.append({"role": settings.role, "content": observation.text})
        turn = player.send(observation.text)
    return {
        "messages": messages,
        "answer": problem.answer,
        "reference_solution": problem.reference_solution,
        "privileged": privileged,
    }, reward


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--games", type=int, default=20_000)
    parser.add_argument("--noise", type=float, default=0.0, help="of the player, 0 to 1")
    parser.add_argument("--privileged", type=float, default=0.0, help="share, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and the noise")
    args = parser.parse_args()
    config = load_config(args.config)
    if config.environment.name not in PLAYERS:
        raise SystemExit(f"no player for {config.environment.name}; there are {list(PLAYERS)}")
    problems = build_sources(config.data.train, args.seed).next(args.games)
    chance = random.Random(f"scripted_play/{args.seed}")
    games = [
        play(config, problem, chance, args.noise, chance.random() < args.privileged)
        for problem in problems
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(line) + "\n" for line, _ in games))
    rewarded = sum(reward > 0 for _, reward in games)
    print(f"{args.out}: {len(games)} games, {rewarded / len(games):.3f} of them with a reward")


if __name__ == "__main__":
    main()
