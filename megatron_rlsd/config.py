"""Configuration: one model per component, YAML plus ``key=value``; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """The configuration is wrong; the message names every offending key and what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(Section):
    hf_path: str
    """Folder with config.json and safetensors; the architecture and the initial weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[str] = ["core_attn"]
    """For selective recompute: Megatron's names (core_attn, mlp, layernorm, ...)."""
    recompute_num_layers: int = Field(1, ge=1)
    """For full recompute: layers per checkpointed unit."""


class TokenizerConfig(Section):
    path: str | None = None
    """Tokenizer folder or sentencepiece file; default: model.hf_path."""
    kind: Literal["auto", "hf", "sentencepiece"] = "auto"
    chat_template: str | None = None
    """A Jinja chat template in place of the tokenizer's own (required where it has none)."""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = False
    """Split activations between tensor-parallel regions over the sequence (needs tensor > 1)."""

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1, got tensor=1")
        return self


class JsonlSource(Section):
    kind: Literal["jsonl"]
    path: str
    on_malformed: Literal["stop", "skip"] = "stop"
    """A malformed line stops the run, or is counted and skipped."""
    shuffle: bool = True
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this source, relative to the others."""


class ReasoningGymSource(Section):
    kind: Literal["reasoning_gym"]
    task: str
    params: dict[str, Any] = {}
    """Difficulty settings of the task, passed to reasoning_gym.create_dataset."""
    size: int = Field(100_000, ge=1)
    """Number of distinct problems."""
    seed: int = 0
    """Seed of the generated problems; give training and evaluation different ones."""
    weight: float = Field(1.0, gt=0)


Source = Annotated[JsonlSource | ReasoningGymSource, Field(discriminator="kind")]


class DataConfig(Section):
    train: list[Source] = Field(min_length=1)
    eval: list[Source] = []


class PromptConfig(Section):
    """How a problem becomes the student's and the teacher's prompt (over the chat template)."""

    system: str | None = None
    format_instruction: str = ""
    """Appended to the question on its own line; kept word for word in the teacher's prompt."""
    hint_introduction: str = "Here is a reference solution to this problem:"
    hint_request: str = "Now solve the problem in your own way."
    sft_response: str = "{reference_solution}"
    """Supervised target; may use {reference_solution} and {answer}. The stop token is appended."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer student prompts are left out and counted."""
    max_hint_tokens: int = Field(2048, ge=1)
    """The hint is cut to its first so many tokens."""


class EmbeddedEngineConfig(Section):
    max_batch_size: int = Field(256, ge=1)
    """Sequences decoded together."""


class RolloutConfig(Section):
    engine: Literal["embedded"] = "embedded"
    prompts_per_step: int = Field(16, ge=1)
    n_samples_per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_response_tokens: int = Field(1024, ge=1)
    stop_token_ids: list[int] = []
    """In addition to the tokenizer's end-of-turn tokens."""
    embedded: EmbeddedEngineConfig = EmbeddedEngineConfig()


class RewardFunctionConfig(Section):
    name: str
    """A registered reward (exact_match, math_verify, reasoning_gym, format, length) or
    ``path/to/file.py:function``."""
    weight: float = 1.0
    params: dict[str, Any] = {}


class RewardConfig(Section):
    functions: list[RewardFunctionConfig] = Field(min_length=1)
    timeout_seconds: float = Field(10.0, gt=0)
    """Limit of one call; a call that passes it counts 0 and its worker is replaced."""
    workers: int = Field(2, ge=1)
    on_error: Literal["zero", "stop"] = "zero"
    """What an exception or a value that is no finite number does: counts 0, or stops the run."""
    max_error_share: float = Field(0.5, ge=0, le=1)
    """With on_error=zero the run still stops when more than this share of a step's calls fail."""
    solved_threshold: float = 0.999
    """A response whose first function returns at least this counts as solved in metrics."""


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
    """Packed tokens per micro-batch; one longer sequence makes a micro-batch of its own."""


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


class CheckpointConfig(Section):
    hf_export_interval: int = Field(0, ge=0)
    """Steps between HF exports to run_dir/hf/step_N; 0: only run_dir/hf/final at the end."""


class ObservabilityConfig(Section):
    tensorboard: bool = True
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """auto: live on a terminal, plain lines elsewhere."""
    samples_per_step: int = Field(4, ge=0)
    """Groups written to run_dir/samples each step."""


class DistributedConfig(Section):
    timeout_seconds: float = Field(1800.0, gt=0)
    """Bound on every collective and on every wait for another rank."""


class Config(Section):
    run_dir: str
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    prompts: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
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
        batch = self.train.global_batch_size
        if batch is not None and trajectories % batch:
            raise ValueError(
                f"train.global_batch_size={batch} must divide rollout.prompts_per_step x "
                f"rollout.n_samples_per_prompt = {trajectories}"
            )
        if self.eval.n_samples and max(self.eval.pass_at_k, default=1) > self.eval.n_samples:
            raise ValueError(
                f"eval.pass_at_k={self.eval.pass_at_k} asks for more than "
                f"eval.n_samples={self.eval.n_samples} samples"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``a.b=value`` overrides (values are YAML) and validate.

    Raises ConfigError that names each unknown key, bad value or missing section.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold a mapping of config sections, got {type(raw).__name__}"
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw, origin=str(path))


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Validate a plain dictionary; errors name the dotted key and what was expected."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole config)"
            if item["type"] == "extra_forbidden":
                lines.append(f"  {key}: unknown key{_known_keys(item['loc'])}")
            else:
                lines.append(f"  {key}: {item['msg']} (got {item['input']!r:.200})")
        raise ConfigError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from None


def dump_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that load_config reads back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = node[_list_index(node, part, override)]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[last if isinstance(node, dict) else _list_index(node, last, override)] = yaml.safe_load(
        value
    )


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {part!r} must be an index below {len(node)}, the list's length"
        )
    return int(part)


def _known_keys(location: tuple[Any, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = getattr(field, "annotation", None)
    names = getattr(section, "model_fields", None)
    return f"; known keys: {', '.join(names)}" if names else ""
