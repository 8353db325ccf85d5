"""The whole configuration, with the checks that span sections."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import model_validator

from megatron_rlsd.config.alarms import AlarmsConfig
from megatron_rlsd.config.data import DataConfig, PromptConfig
from megatron_rlsd.config.environment import ONE_TURN, SESSIONS, EnvironmentConfig
from megatron_rlsd.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_rlsd.config.operation import CheckpointConfig, DistributedConfig, ObservabilityConfig
from megatron_rlsd.config.precision import fp8_parameter_problems, tp_overlap_problems
from megatron_rlsd.config.reward import HttpRewardConfig, RewardConfig
from megatron_rlsd.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_rlsd.config.section import Section
from megatron_rlsd.config.training import (
    AlgorithmConfig,
    EvalConfig,
    OptimizerConfig,
    SFTConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_rlsd.config.variants import contradictions, filled_in


class Config(Section):
    run_dir: str
    plugins: list[str] = []
    """Files (``path/to/file.py``) and modules of your own, imported before anything is looked up by
    name: they register algorithms, model families and rewards (docs/extending.md)."""
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    prompts: PromptConfig = PromptConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    rollout: RolloutConfig = RolloutConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run, over which the learning rate is scheduled."""
        return self.train.steps * self.updates_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps that each rollout is used for."""
        trajectories = self.rollout.prompts_per_step * self.rollout.n_samples_per_prompt
        updates = trajectories // (self.train.global_batch_size or trajectories)
        return updates * self.train.epochs_per_rollout

    @property
    def scores_while_sampling(self) -> bool:
        """Are groups scored as they come, beside servers that sample the others?

        Not where trainer and servers share devices, where a response has turns, which are sampled
        together, and where sampling goes on beside training anyway. Nor are hidden states and the
        sets of top-p and top-k: those of groups would have to move between ranks.
        """
        rollout = self.rollout
        return (
            rollout.score_while_sampling
            and rollout.engine == "sglang"
            and not rollout.colocated
            and not rollout.asynchronous.max_staleness
            and not self.environment.plays
            and not self.algorithm.divergence_coef
            and not rollout.truncates
        )

    @property
    def weight_folder(self) -> Path | None:
        """The folder through which servers get their weights; None: they get them in another way,
        or there are none."""
        sync = self.weight_sync
        if self.rollout.engine != "sglang" or sync.transport != "disk":
            return None
        return Path(sync.path or Path(self.run_dir) / "weight_sync")

    @property
    def eval_response_tokens(self) -> int:
        """Most tokens of a response in an evaluation."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def further_prompts(self) -> int:
        """Prompts at most under which the teacher scores a response beside its first."""
        if not self.algorithm.contrasts_hints:
            return 0
        several = self.algorithm.evidence == "correct_over_wrong_hint"
        return self.teacher.wrong_hints if several else 1

    @property
    def answer_pattern(self) -> str | None:
        """Where a response's answer stands; None: in its last box."""
        correctness = self.reward.functions[self.reward.labels.index(self.reward.correctness_label)]
        return self.eval.answer_pattern or correctness.params.get("pattern")

    @property
    def pack_multiple(self) -> int:
        """Each micro-batch, context-parallel ranks together, is padded to a multiple of this."""
        parallel, precision = self.parallel, self.model.precision
        each = precision.token_multiple * parallel.context
        if precision.scales_blocks and parallel.sequence:
            # Transformer Engine gathers a rank's part in 8 bits only where it is whole blocks.
            each *= parallel.tensor
        return math.lcm(parallel.pack_multiple, each)

    @property
    def fixed_pack_length(self) -> int | None:
        """Tokens of every micro-batch, context-parallel ranks together; None: they differ."""
        return self.train.max_tokens_per_microbatch if self.model.tp_comm_overlap else None

    @property
    def _longest_sequence(self) -> int:
        """Tokens of the longest prompt, hint and response, the words around a hint left out."""
        longest = self.prompts.max_prompt_tokens + self.rollout.max_response_tokens
        algorithm = self.algorithm
        hinted = algorithm.rlsd_lambda or algorithm.scores_every_response
        if hinted and self.teacher.hint != "none":
            longest += self.prompts.max_hint_tokens
        return longest

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, raw: Any) -> Any:
        """Files of release 0.1 say ``teacher.noise_share`` for ``alarms.noise_share_warn``."""
        teacher = raw.get("teacher") if isinstance(raw, dict) else None
        if not isinstance(teacher, dict) or "noise_share" not in teacher:
            return raw
        teacher = dict(teacher)
        old, alarms = teacher.pop("noise_share"), raw.get("alarms", {})
        if isinstance(alarms, dict):
            alarms = {"noise_share_warn": old, **alarms}
        return {**raw, "teacher": teacher, "alarms": alarms}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_variant(cls, raw: Any) -> Any:
        """Some algorithms have another default teacher."""
        if not isinstance(raw, dict):
            return raw
        algorithm, teacher = raw.get("algorithm", {}), raw.get("teacher", {})
        if not isinstance(algorithm, dict) or not isinstance(teacher, dict):
            return raw
        return {**raw, "teacher": filled_in(algorithm.get("name", "rlsd"), teacher, "teacher")}

    @model_validator(mode="after")
    def _check_algorithm(self) -> Config:
        algorithm, teacher = self.algorithm, self.teacher
        problems = contradictions(algorithm.name, teacher, "teacher")
        others = {"hf_path": teacher.hf_path, "sglang.url": teacher.sglang.url}
        given = [f"teacher.{key}={value!r}" for key, value in others.items() if value is not None]
        if algorithm.name == "opd" and len(given) != 1:
            problems.append(
                "algorithm.name=opd needs teacher.hf_path or teacher.sglang.url, the model to "
                f"learn from; given: {', '.join(given) or 'neither'}"
            )
        if algorithm.name != "opd" and given:
            problems.append(
                f"{' and '.join(given)} is for algorithm.name=opd; the teacher of "
                f"{algorithm.name} is the student under another prompt, scored by the same engine"
            )
        if teacher.sglang.url is not None:
            problems += self._problems_of_a_served_teacher()
        if given and self.rollout.truncates:
            problems.append(
                f"{' and '.join(given)} needs rollout.top_p=1 and rollout.top_k=0, got "
                f"{self.rollout.top_p:g} and {self.rollout.top_k}: another model's log-"
                "probabilities are over its whole vocabulary, the policy's over the tokens that "
                "could be sampled"
            )
        samples = self.rollout.n_samples_per_prompt
        compares = algorithm.advantage not in ("none", "one", "own")
        of_group = teacher.hint in ("own_correct_response", "own_correct_step")
        if samples == 1 and (compares or of_group):
            problems.append(
                f"rollout.n_samples_per_prompt=1 leaves nothing to compare a response with; "
                f"algorithm.advantage={algorithm.advantage} and teacher.hint={teacher.hint} need "
                "at least 2"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_a_served_teacher(self) -> list[str]:
        problems, limit = [], self.teacher.sglang.score_timeout_seconds
        if self.rollout.temperature != 1:
            problems.append(
                f"teacher.sglang.url needs rollout.temperature=1, not {self.rollout.temperature:g}:"
                " SGLang scores given tokens at temperature 1 only"
            )
        if limit >= self.distributed.timeout_seconds:
            problems.append(
                f"teacher.sglang.score_timeout_seconds={limit:g} must be below "
                f"distributed.timeout_seconds={self.distributed.timeout_seconds:g}, after which the"
                " other ranks give up"
            )
        return problems

    @model_validator(mode="after")
    def _check_environment(self) -> Config:
        name, problems = self.environment.name, []
        known = [ONE_TURN, *self.environment.others]
        for source in (*self.data.train, *self.data.eval):
            if source.environment not in (None, *known):
                problems.append(
                    f"a source of data says environment={source.environment}; environment.others "
                    f"has: {', '.join(known[1:]) or 'none'}"
                )
            elif source.environment is not None and name == SESSIONS:
                problems.append(
                    f"environment.name={name} plays every source, but one of data says "
                    f"environment={source.environment}"
                )
        if not self.environment.plays and any(
            each.name == "environment" for each in self.reward.functions
        ):
            problems.append("reward environment needs environment.name, whose own reward it is")
        if name == SESSIONS and (self.prompts.system or self.prompts.format_instruction):
            problems.append(
                f"environment.name={name} needs prompts.system and prompts.format_instruction "
                "empty: the agent writes all messages, and gives its own instructions"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _check_what_layers_need(self) -> Config:
        if problems := self.layer_problems():
            raise ValueError("; ".join(problems))
        return self

    def layer_problems(self) -> list[str]:
        """What the layout and the optimizer lack for the kind of layers; also asked by the planner
        of each layout that it tries."""
        problems: list[str] = []
        if self.model.precision.fp8_parameters:
            problems += fp8_parameter_problems(self.optimizer)
        if self.model.tp_comm_overlap:
            problems += tp_overlap_problems(
                self.parallel,
                self.model.precision,
                tokens=self.train.max_tokens_per_microbatch,
                longest=self._longest_sequence,
            )
        return problems

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        trajectories = self.rollout.prompts_per_step * self.rollout.n_samples_per_prompt
        if self.sft.stop_at_accuracy and not (
            self.data.eval and self.eval.n_samples and self.eval.interval
        ):
            raise ValueError(
                "sft.stop_at_accuracy needs data.eval, eval.interval > 0 and eval.n_samples > 0"
            )
        if self.train.max_tokens_per_microbatch < self.pack_multiple:
            raise ValueError(
                f"train.max_tokens_per_microbatch={self.train.max_tokens_per_microbatch} is less "
                f"than {self.pack_multiple}, of which every micro-batch is a multiple in "
                f"this layout"
            )
        batch = self.train.global_batch_size
        if batch is not None and trajectories % batch:
            raise ValueError(
                f"train.global_batch_size={batch} must divide rollout.prompts_per_step x "
                f"rollout.n_samples_per_prompt = {trajectories}"
            )
        if self.rollout.colocated and self.weight_sync.transport == "broadcast":
            raise ValueError(
                "rollout.colocated=true needs weight_sync.transport=ipc or disk: nccl connects no "
                "two processes on one GPU"
            )
        for number, function in enumerate(self.reward.functions):
            if not isinstance(function, HttpRewardConfig):
                continue
            if function.deadline_seconds >= self.distributed.timeout_seconds:
                raise ValueError(
                    f"reward.functions.{number}.deadline_seconds={function.deadline_seconds:g} "
                    "must be below distributed.timeout_seconds="
                    f"{self.distributed.timeout_seconds:g}, after which the other ranks give up"
                )
        if self.rollout.engine == "sglang":
            for key in ("generate_timeout_seconds", "start_timeout_seconds"):
                limit = getattr(self.rollout.sglang, key)
                if limit >= self.distributed.timeout_seconds:
                    raise ValueError(
                        f"rollout.sglang.{key}={limit:g} must be below distributed.timeout_seconds="
                        f"{self.distributed.timeout_seconds:g}, after which the other ranks give up"
                    )
        if self.eval.n_samples and max(self.eval.pass_at_k, default=1) > self.eval.n_samples:
            raise ValueError(
                f"eval.pass_at_k={self.eval.pass_at_k} asks for more than "
                f"eval.n_samples={self.eval.n_samples} samples"
            )
        return self
