"""The whole configuration, with the checks that span sections."""

from __future__ import annotations

from pydantic import model_validator

from megatron_rlsd.config.data import DataConfig, PromptConfig, RewardConfig
from megatron_rlsd.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_rlsd.config.operation import CheckpointConfig, DistributedConfig, ObservabilityConfig
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


class Config(Section):
    run_dir: str
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    prompts: PromptConfig = PromptConfig()
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
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        trajectories = self.rollout.prompts_per_step * self.rollout.n_samples_per_prompt
        if self.sft.stop_at_accuracy and not (
            self.data.eval and self.eval.n_samples and self.eval.interval
        ):
            raise ValueError(
                "sft.stop_at_accuracy needs data.eval, eval.interval > 0 and eval.n_samples > 0"
            )
        if self.train.max_tokens_per_microbatch < self.parallel.pack_multiple:
            raise ValueError(
                f"train.max_tokens_per_microbatch={self.train.max_tokens_per_microbatch} is less "
                f"than {self.parallel.pack_multiple}, of which every micro-batch is a multiple in "
                f"this layout"
            )
        batch = self.train.global_batch_size
        if batch is not None and trajectories % batch:
            raise ValueError(
                f"train.global_batch_size={batch} must divide rollout.prompts_per_step x "
                f"rollout.n_samples_per_prompt = {trajectories}"
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
