"""The algorithm, its teacher, the optimizer and the training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rlsd.config.section import Section


class AlgorithmConfig(Section):
    name: Literal["rlsd", "grpo"] = "rlsd"
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """(R - mean) / (std + 1e-6) | R - mean (Dr. GRPO) | R - mean of the others (RLOO)."""
    group_filter: bool = False
    """DAPO: leave out groups whose rewards are all equal and sample more in their place."""
    max_refills: int = Field(4, ge=0)
    """Sampling rounds after the first that the group filter may ask for."""
    rlsd_lambda: float = Field(0.5, ge=0, le=1)
    lambda_warmup_steps: int = Field(0, ge=0)
    lambda_hold_steps: int = Field(0, ge=0)
    lambda_decay_steps: int = Field(0, ge=0)
    """Linear warm-up from 0, hold, linear decay to 0; 0 decay steps: no decay."""
    evidence_clip: float = Field(0.2, ge=0)
    negative_only: bool = False
    eps_clip_low: float = Field(0.2, ge=0)
    eps_clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(3.0, gt=1)
    kl_coef: float = Field(0.0, ge=0)
    entropy_coef: float = 0.0
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all response tokens, or mean over responses of their token means; both over the
    global batch."""


class TeacherConfig(Section):
    mode: Literal["live", "frozen", "periodic", "ema"] = "frozen"
    interval: int = Field(20, ge=1)
    """periodic: steps between refreshes from the student."""
    ema_decay: float = Field(0.99, ge=0, le=1)
    hint: Literal["reference_solution", "answer", "none"] = "reference_solution"
    """Privileged information in the teacher's prompt; ``none`` makes both prompts identical, so
    that the gain shows the noise floor. Problems without a reference solution use the answer."""


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient-norm bound; 0: no clipping."""
    distributed: bool = False
    """Megatron's distributed optimizer: optimizer state split over data-parallel ranks."""


class TrainConfig(Section):
    steps: int = Field(100, ge=0)
    seed: int = 0
    global_batch_size: int | None = Field(None, ge=1)
    """Trajectories per optimizer step; default: all of a rollout, that is one update."""
    epochs_per_rollout: int = Field(1, ge=1)
    max_tokens_per_microbatch: int = Field(8192, ge=1)
    """Packed tokens per micro-batch, padding included and context-parallel ranks together; one
    longer sequence makes a micro-batch of its own."""
    resume: str = "auto"
    """auto: go on at the last whole checkpoint in run_dir, if there is one. never: start anew. Else
    a checkpoint folder to start from; one that holds weights only starts at step 0."""
    max_bad_steps: int = Field(3, ge=1)
    """Steps in a row with a loss or gradient that is no finite number until the run stops. Each of
    them is skipped and its batch kept in run_dir/bad_steps."""
    record_steps: Literal["bad", "all"] | list[int] = "bad"
    """Steps kept in run_dir/recorded_steps for tools/replay_step.py, besides bad ones."""


class SFTConfig(Section):
    """Supervised warm start (python -m megatron_rlsd.sft)."""

    steps: int = Field(100, ge=0)
    batch_size: int = Field(64, ge=1)
    privileged_share: float = Field(0.0, ge=0, le=1)
    """Share of examples under the teacher's privileged prompt, hinted as ``teacher.hint``."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End the warm start early once an evaluation (``eval.interval``) finds the first source's
    sampled pass@1 at least this high; whoever reports accuracies should report other problems."""


class EvalConfig(Section):
    interval: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the start and the end."""
    at_start: bool = True
    num_problems: int = Field(128, ge=1)
    """Problems per evaluation source, always the same ones."""
    greedy: bool = True
    n_samples: int = Field(1, ge=0)
    """Sampled responses per problem, at temperature; 0: greedy only."""
    temperature: float = Field(1.0, gt=0)
    pass_at_k: list[int] = [1]
    """Unbiased pass@k over the sampled responses; each k <= n_samples."""
