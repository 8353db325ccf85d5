"""Data sources, the environment and reward functions, tried with the first problems."""

from __future__ import annotations

from megatron_rlsd.config import SESSIONS, Config
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
from megatron_rlsd.environments.sessions.agents import AgentPool
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


def first_problems(config: Config) -> list[Problem]:
    return build_sources(config.data.train, config.train.seed).next(PROBLEMS)


def check_environment(config: Config, tokenizer: Tokenizer, problem: Problem | None) -> str:
    """Starts the workers, which load the environment, and begins an episode."""
    name = config.environment.label
    if config.environment.name == SESSIONS:
        with AgentPool(config.environment) as agents:
            agents.wait_until_ready()
        return f"{config.environment.sessions.agent}: loaded"
    ChatTurns(tokenizer, config.environment.role)
    # One episode: no share of failures is too many.
    settings = config.environment.model_copy(
        update={"max_error_share": 1.0, "on_error": "leave_out"}
    )
    with EnvironmentPool(settings) as pool:
        pool.wait_until_ready()
        if problem is None or not settings.answers(problem.environment):
            return f"{name}: loaded"
        pool.begin(1)
        (opening,) = pool.answer([Call(0, problem, [], [])])
    if isinstance(opening, Failure):
        raise UserError(f"{name} fails on the first problem: {opening.reason}")
    return f"{name}: begins the first problem" + (f" with {opening.text!r}" * bool(opening.text))


def check_rewards(config: Config, problems: list[Problem]) -> str:
    """Starts a worker, which loads the functions, and scores an answer, a wrong and an empty one.

    The answer comes alone, in ``prompts.sft_response`` and as the reference solution: which form
    the functions want is theirs to say. Doubt where none of these is told from a wrong answer.
    """
    names = ", ".join(function.name for function in config.reward.functions)
    # Three answers are too few for a share of failures; each is judged here.
    settings = config.reward.model_copy(
        update={"workers": 1, "on_error": "leave_out", "max_error_share": 1.0}
    )
    with RewardPool(settings) as pool:
        pool.wait_until_ready()
        if not problems:
            return f"{names}: loaded"
        problem = problems[0]
        right, wrong = responses(config, problem, problem.answer), []
        for other in problems[1:]:
            if other.answer != problem.answer:
                wrong = responses(config, other, other.answer)
                break
        samples = [_sample(config, problem, text) for text in (*right, *wrong, "")]
        results = pool.score(samples)
    if errors := results[0].errors:
        texts = "; ".join(f"{name}: {reason}" for name, reason in errors.items())
        raise UserError(f"a reward function fails on the first problem: {texts}")
    first = config.reward.correctness_label
    values = [result.parts[first] for result in results]
    best, others = _best(values[: len(right)]), _best(values[len(right) :])
    failed = [name for result in results[len(right) :] for name in result.errors]
    if failed:
        raise Doubt(f"{failed[0]} fails on a wrong or an empty answer to the first problem")
    told = f"answer {_shown(best)}, wrong {_shown(_best(values[len(right) : -1]))}, empty "
    told = f"{names}: {told}{_shown(values[-1])}"
    if best is not None and others is not None and best <= others:
        raise Doubt(
            f"{told}: {first} tells no answer to the first problem from a wrong or an empty one; "
            f"where that holds for all problems, nothing is learned. Tried: {right[0]!r}"
            + (f" and {right[1]!r}" if len(right) > 1 else "")
        )
    return told


def responses(config: Config, problem: Problem, answer: str) -> list[str]:
    """Forms in which a model may give this answer."""
    solution = problem.reference_solution
    target = config.prompts.sft_response.format(
        reference_solution=solution or "", answer=answer
    ).strip()
    forms = [answer, target, *([solution] if solution else [])]
    return list(dict.fromkeys(form for form in forms if form))


def _sample(config: Config, problem: Problem, response: str) -> RewardInput:
    limit = config.rollout.max_response_tokens
    played = 0.0 if config.environment.answers(problem.environment) else None
    return RewardInput(problem, response, 1, limit, "stop", environment_reward=played)


def _best(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
