"""Data sources, the environment and reward functions, tried with the first problems."""

from __future__ import annotations

from megatron_rlsd.config import Config
from megatron_rlsd.data import (
    ChatTurns,
    PromptBuilder,
    PromptTooLong,
    Tokenizer,
    build_sources,
    evaluation_problems,
)
from megatron_rlsd.diagnosis.check import Doubt
from megatron_rlsd.environments import Call, EnvironmentPool, Failure
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem, RewardInput

PROBLEMS = 16


def check_data(config: Config, prompts: PromptBuilder) -> str:
    """The first problems of the sources, as prompts of student and teacher; all to evaluate."""
    problems = build_sources(config.data.train, config.train.seed).next(PROBLEMS)
    lengths, too_long, cut = [], 0, 0
    for problem in problems:
        try:
            lengths.append(len(prompts.student(problem)))
            cut += prompts.privileged(problem).hint_cut
        except PromptTooLong:
            too_long += 1
    held_out = [
        problem
        for source in config.data.eval
        for problem in evaluation_problems(source, config.eval.num_problems)
    ]
    never_asked = sum(not _fits(problem, prompts) for problem in held_out)
    limit = prompts.limit().why
    if not lengths:
        raise UserError(f"all of the first {len(problems)} prompts are longer than {limit}")
    doubts = []
    if too_long:
        doubts.append(f"{too_long} of the first {len(problems)} prompts will be left out")
    if never_asked:
        doubts.append(f"{never_asked} of {len(held_out)} problems will be left out of evaluations")
    if doubts:
        doubts = [f"longer than {limit}: {' and '.join(doubts)}"]
    if cut:
        doubts.append(
            f"the hints of {cut} of the first {len(lengths)} problems will be cut, to "
            f"prompts.max_hint_tokens={config.prompts.max_hint_tokens} or to what the model's "
            "positions leave"
        )
    if doubts:
        raise Doubt("; ".join(doubts))
    return (
        f"first {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens; "
        f"{len(held_out)} problems to evaluate"
    )


def _fits(problem: Problem, prompts: PromptBuilder) -> bool:
    try:
        prompts.student(problem)
    except PromptTooLong:
        return False
    return True


def first_problem(config: Config) -> Problem:
    return build_sources(config.data.train, config.train.seed).next(1)[0]


def check_environment(config: Config, tokenizer: Tokenizer, problem: Problem | None) -> str:
    """Starts the workers, which load the environment, and begins an episode."""
    name = config.environment.name
    ChatTurns(tokenizer, config.environment.role)
    # One episode: no share of failures is too many.
    settings = config.environment.model_copy(
        update={"max_error_share": 1.0, "on_error": "leave_out"}
    )
    with EnvironmentPool(settings) as pool:
        pool.wait_until_ready()
        if problem is None:
            return f"{name}: loaded"
        pool.begin(1)
        (opening,) = pool.answer([Call(0, problem, [], [])])
    if isinstance(opening, Failure):
        raise UserError(f"{name} fails on the first problem: {opening.reason}")
    return f"{name}: begins the first problem" + (f" with {opening.text!r}" * bool(opening.text))


def check_rewards(config: Config, problem: Problem | None) -> str:
    """Starts the workers, which load the functions, and scores an answer."""
    names = ", ".join(function.name for function in config.reward.functions)
    with RewardPool(config.reward) as pool:
        pool.wait_until_ready()
        if problem is None:
            return f"{names}: loaded"
        limit = config.rollout.max_response_tokens
        played = None if config.environment.name is None else 0.0
        sample = RewardInput(problem, problem.answer, 1, limit, "stop", environment_reward=played)
        (result,) = pool.score([sample])
    if result.errors:
        texts = "; ".join(f"{name}: {reason}" for name, reason in result.errors.items())
        raise UserError(f"a reward function fails on the first problem: {texts}")
    return f"{names}: the first problem's answer alone scores {result.value:g}"
