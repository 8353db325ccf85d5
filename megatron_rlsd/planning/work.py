"""How many tokens a step moves: taken from the configuration and from assumed lengths."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import lru_cache

from megatron_rlsd.config import Config, ParallelConfig
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.parallel.memory import rank_parameters
from megatron_rlsd.planning.activations import Pack
from megatron_rlsd.planning.memory import Workload
from megatron_rlsd.runtime.rounding import round_up

QUANTILES = 256


@dataclass(frozen=True)
class Lengths:
    """Assumed lengths in tokens; responses are log-normal, cut at rollout.max_response_tokens."""

    prompt: float
    hint: float
    response: float
    """Mean before the cut."""
    spread: float = 0.6
    """Standard deviation of the logarithm."""

    @classmethod
    def default(cls, config: Config) -> Lengths:
        """Half of the longest response, a quarter of the longest prompt and hint."""
        return cls(
            prompt=max(1.0, config.prompts.max_prompt_tokens / 4),
            hint=max(1.0, config.prompts.max_hint_tokens / 4),
            response=max(1.0, config.rollout.max_response_tokens / 2),
        )

    def responses(self, longest: int, count: int) -> list[int]:
        """``count`` lengths at even quantiles of the distribution, ascending."""
        normal = statistics.NormalDist(
            math.log(self.response) - self.spread**2 / 2, self.spread or 1e-9
        )
        quantiles = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
        return [max(1, min(longest, round(math.exp(q)))) for q in quantiles]

    def mean_response(self, longest: int) -> float:
        return statistics.fmean(self.responses(longest, QUANTILES))


@dataclass(frozen=True)
class StepTokens:
    """The tokens of one training step, all ranks together."""

    trajectories: int
    prompt: float
    hint: float
    response: float
    """Means of one trajectory."""
    updates: int
    """Optimizer steps."""

    @property
    def student(self) -> float:
        """Tokens that one pass over all trajectories puts through the model."""
        return self.trajectories * (self.prompt + self.response)

    @property
    def teacher(self) -> float:
        return self.trajectories * (self.prompt + self.hint + self.response)

    @property
    def responses(self) -> float:
        return self.trajectories * self.response


def step_tokens(config: Config, lengths: Lengths) -> StepTokens:
    rollout = config.rollout
    trajectories = rollout.prompts_per_step * rollout.n_samples_per_prompt
    batch = config.train.global_batch_size or trajectories
    return StepTokens(
        trajectories=trajectories,
        prompt=lengths.prompt,
        hint=0.0 if config.teacher.hint == "none" else lengths.hint,
        response=lengths.mean_response(rollout.max_response_tokens),
        updates=trajectories // batch * config.train.epochs_per_rollout,
    )


def workload(config: Config, tokens: StepTokens, data_parallel: int) -> Workload:
    """The longest pack of each pass, and the micro-batches of a rank.

    A sequence longer than train.max_tokens_per_microbatch makes a micro-batch of its own, so the
    longest prompt, hint and response decide where they are longer.
    """
    limit = config.train.max_tokens_per_microbatch
    multiple = config.pack_multiple
    longest = config.prompts.max_prompt_tokens + config.rollout.max_response_tokens
    hinted = longest + config.prompts.max_hint_tokens

    def pack(sequence: int) -> Pack:
        length = round_up(sequence, multiple)
        return Pack.of(max(limit // multiple * multiple, length), length)

    per_rank = tokens.student * config.train.epochs_per_rollout / tokens.updates / data_parallel
    count = max(1, math.ceil(per_rank / limit))
    if config.parallel.virtual_pipeline > 1:
        count = round_up(count, config.parallel.pipeline)
    return Workload(
        pack(longest),
        pack(hinted),
        count,
        responses=math.ceil(tokens.responses / data_parallel),
        external_teacher=_parameters_of(config.teacher.hf_path),
    )


@lru_cache
def _parameters_of(hf_path: str | None) -> int:
    """The parameters of the model in a folder; its config.json must be of a known family."""
    if hf_path is None:
        return 0
    hf_config = load_hf_config(hf_path)
    return rank_parameters(family_for(hf_config).dims(hf_config), ParallelConfig(), 0).total
