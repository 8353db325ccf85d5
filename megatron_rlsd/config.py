"""Configuration: one model per component, YAML plus ``key=value``; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)


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
    """Processes = tensor x context x pipeline x data parallel, which takes what is left."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks on each pipeline stage, interleaved (needs pipeline > 1): smaller bubbles for
    more communication. The number of micro-batches is then a multiple of pipeline."""
    pipeline_first_stage_layers: int | None = Field(None, ge=1)
    pipeline_last_stage_layers: int | None = Field(None, ge=1)
    """Layers of the first and of the last pipeline stage, whose embedding and head cost time too;
    the other stages share the rest evenly."""
    context: int = Field(1, ge=1)
    """Ranks that share each sequence: every one holds two chunks of it, 1 / context in all."""
    expert: int = Field(1, ge=1)
    """Ranks that share the experts of each mixture-of-experts layer. Taken out of the tensor,
    context and data-parallel ranks of a pipeline stage, not in addition to them."""
    expert_tensor: int | None = Field(None, ge=1)
    """Ranks that split each expert; default: as tensor."""
    sequence: bool = False
    """Split activations between tensor-parallel regions over the sequence (needs tensor > 1)."""

    @model_validator(mode="after")
    def _dependent_sizes(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1, got tensor=1")
        for key in (
            "virtual_pipeline", "pipeline_first_stage_layers", "pipeline_last_stage_layers"
        ):  # fmt: skip
            value = getattr(self, key)
            if self.pipeline == 1 and value not in (None, type(self).model_fields[key].default):
                raise ValueError(f"{key}={value} needs pipeline > 1, got pipeline=1")
        return self

    @property
    def expert_tensor_size(self) -> int:
        """``expert_tensor`` with its default applied."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this many tokens."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """Each micro-batch is padded to a multiple of this many tokens."""
        return self.sequence_multiple * (self.tensor if self.sequence else 1)


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


class SGLangConfig(Section):
    """rollout.engine=sglang: servers that the trainer starts, or servers that run already."""

    urls: list[str] = []
    """Servers that run already, such as http://node7:30000. Empty: rank 0 starts its own."""
    python: str | None = None
    """Python of SGLang's environment; default: the project's own, .venv-sglang/bin/python."""
    num_servers: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    """Devices of each server."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where this machine has it."""
    first_gpu: int = Field(0, ge=0)
    """Server i takes the GPUs from first_gpu + i * tensor_parallel on."""
    host: str = "127.0.0.1"
    """Address that started servers bind; whoever reaches it can use them, see api_key."""
    port: int | None = Field(None, ge=1, le=65535)
    """Port of the first server, the others follow; default: free ports."""
    args: dict[str, Any] = {}
    """Any flag of sglang.launch_server: {mem_fraction_static: 0.8, enable_memory_saver: true}."""
    env: dict[str, str] = {}
    """Environment variables of the started servers."""
    api_key: str | None = None
    """Asked for by started servers and sent to all; ``env:NAME`` reads it from that variable, so
    that the key is not written to run_dir/config.yaml."""
    start_timeout_seconds: float = Field(1200.0, gt=0)
    """From the start of a process until it serves. Below distributed.timeout_seconds, after which
    the other ranks give up waiting for rank 0."""
    request_timeout_seconds: float = Field(600.0, gt=0)
    """Of one response; the request then goes to another server."""
    generate_timeout_seconds: float = Field(1500.0, gt=0)
    """Of all responses asked for at once; the run then stops. Below distributed.timeout_seconds."""
    update_timeout_seconds: float = Field(600.0, gt=0)
    """Of each request to a server while weights are updated."""
    max_in_flight: int = Field(256, ge=1)
    """Requests at one server at a time."""
    max_attempts: int = Field(4, ge=1)
    """Tries of one request on servers that fail, before the run stops."""
    health_interval_seconds: float = Field(10.0, gt=0)
    health_timeout_seconds: float = Field(30.0, gt=1)
    """SGLang's health check takes one second by itself."""
    health_failures: int = Field(3, ge=1)
    """Failed health checks in a row after which a server counts as hung."""
    max_restarts: int = Field(5, ge=0)
    """Restarts of one server in a row, with growing pauses, before it is given up."""


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    prompts_per_step: int = Field(16, ge=1)
    n_samples_per_prompt: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_response_tokens: int = Field(1024, ge=1)
    stop_token_ids: list[int] = []
    """In addition to the tokenizer's end-of-turn tokens."""
    embedded: EmbeddedEngineConfig = EmbeddedEngineConfig()
    sglang: SGLangConfig = SGLangConfig()

    @model_validator(mode="after")
    def _sample_what_is_scored(self) -> RolloutConfig:
        if self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                f"training samples need top_p=1 and top_k=0, got top_p={self.top_p} and "
                f"top_k={self.top_k}: the loss scores tokens under the full softmax, and engines "
                "report log-probabilities that top_p and top_k do not renormalise"
            )
        return self


class WeightSyncConfig(Section):
    """How rollout servers get new weights (rollout.engine=sglang)."""

    transport: Literal["disk"] = "disk"
    path: str | None = None
    """disk: a folder that trainer and servers share; default: run_dir/weight_sync."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the published tensors; default: model.dtype."""
    parity_interval: int = Field(100, ge=0)
    """Steps between comparisons of server and trainer log-probabilities on fixed text, the first
    before step 0; 0: none."""
    parity_bound: float = Field(0.05, gt=0)
    """Largest mean absolute difference of a token's log-probability; above it the run stops.
    Float32 on both sides stays below 1e-4; bfloat16 kernels differ by about 0.01."""


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


class CheckpointConfig(Section):
    """run_dir/checkpoints: the whole training state (docs/checkpoints.md)."""

    interval: int = Field(0, ge=0)
    """Steps between checkpoints, and one after the last step; 0: only when a signal stops the
    run."""
    keep: int | None = Field(2, ge=1)
    """Newest checkpoints that stay; null: all."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on."""
    hf_export_interval: int = Field(0, ge=0)
    """Steps between HF exports to run_dir/hf/step_N; 0: only run_dir/hf/final at the end."""


class WandbConfig(Section):
    enabled: bool = False
    """Needs the package wandb."""
    mode: Literal["online", "offline"] = "online"
    """offline: written under run_dir/wandb, to be sent later with ``wandb sync``."""
    project: str = "megatron_rlsd"
    entity: str | None = None
    """The user or team; default: the account's own."""
    name: str | None = None
    """The run's name; default: that of run_dir."""


class MlflowConfig(Section):
    enabled: bool = False
    """Needs the package mlflow (or the smaller mlflow-skinny)."""
    tracking_uri: str | None = None
    """A server or a database; default: the folder run_dir/mlflow."""
    experiment: str = "megatron_rlsd"
    name: str | None = None
    """The run's name; default: that of run_dir."""


class ObservabilityConfig(Section):
    tensorboard: bool = True
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    trace: bool = False
    """Write the phases of every step on all ranks to run_dir/trace/trace.json (for Perfetto); costs
    one small gather a step."""
    profile_steps: list[NonNegativeInt] = []
    """Steps (from 0) to run under torch.profiler, each to a file in run_dir/profile."""
    profile_ranks: list[NonNegativeInt] = [0]
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """auto: live on a terminal, plain lines elsewhere."""
    samples_per_step: int = Field(4, ge=0)
    """Groups written to run_dir/samples each step, with what the update made of their tokens."""


class DistributedConfig(Section):
    timeout_seconds: float = Field(1800.0, gt=0)
    """Bound on every collective and on every wait for another rank."""
    stall_seconds: float = Field(300.0, ge=5)
    """A rank that has not been heard of for so long (dead, or stopped) ends the run everywhere."""


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
