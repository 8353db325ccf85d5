"""Engines that sample responses, and how they get new weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_rlsd.config.secrets import Named, NamedTexts, Secret, without_login
from megatron_rlsd.config.section import Section


class EmbeddedEngineConfig(Section):
    max_batch_size: int = Field(256, ge=1)
    """Sequences decoded together."""


class SGLangConfig(Section):
    """rollout.engine=sglang: servers that the trainer starts, or servers that run already."""

    urls: list[Annotated[str, AfterValidator(without_login)]] = []
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
    args: Named = {}
    """Any flag of sglang.launch_server: {mem_fraction_static: 0.8, enable_memory_saver: true}."""
    env: NamedTexts = {}
    """Environment variables of the started servers."""
    api_key: Secret | None = None
    """Asked for by started servers and sent to all; ``env:NAME`` reads it from that variable.
    Files, reports and messages show ``env:NAME`` as it is and a mask in place of any other key."""
    start_timeout_seconds: float = Field(1200.0, gt=0)
    """From the start of a process until it serves. Below distributed.timeout_seconds, after which
    the other ranks give up waiting for rank 0."""
    request_timeout_seconds: float = Field(600.0, gt=0)
    """The limit for one response; the request then goes to another server."""
    generate_timeout_seconds: float = Field(1500.0, gt=0)
    """The limit for all responses asked for at once; the run then stops. It must be below
    distributed.timeout_seconds."""
    update_timeout_seconds: float = Field(600.0, gt=0)
    """The limit for each request to a server while weights are updated."""
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


class AsynchronousConfig(Section):
    """Rollouts that go on while the trainer trains (rollout.engine=sglang)."""

    max_staleness: int = Field(0, ge=0)
    """Steps that a sample's oldest token may be behind the weights that learn from it; samples
    beyond are dropped and their questions asked again. 0: rollout and training take turns."""
    pause: Literal["abort", "retract", "in_place"] = "abort"
    """What a weight update does to responses under way. abort: the server gives out what it has and
    is asked for the rest. retract: it computes its cache anew under the new weights. in_place: it
    goes on with the old cache."""


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    prompts_per_step: int = Field(16, ge=1)
    n_samples_per_prompt: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose mass reaches this share of all. Old, new, reference
    and teacher log-probabilities are then over these tokens alone (docs/rollout.md)."""
    top_k: int = Field(0, ge=0)
    """Sample from this many of the likeliest tokens, those of top_p among them; 0: no limit."""
    max_response_tokens: int = Field(1024, ge=1)
    stop_token_ids: list[int] = []
    """In addition to the tokenizer's end-of-turn tokens."""
    colocated: bool = False
    """The trainer's own servers share its GPUs: they give back the memory of weights and cache
    while it trains, and optimizer state and gradients leave the GPUs while they generate. The
    servers then get enable_memory_saver; without GPUs nothing is freed."""
    score_while_sampling: bool = False
    """With servers beside the trainer: teacher, old and reference log-probabilities are computed of
    each group as it comes, while the others are still being sampled. What is packed together then
    depends on time, and log-probabilities on that to about 1e-6. false: after the last response."""
    asynchronous: AsynchronousConfig = AsynchronousConfig()
    embedded: EmbeddedEngineConfig = EmbeddedEngineConfig()
    sglang: SGLangConfig = SGLangConfig()

    @model_validator(mode="after")
    def _asynchronous_needs_servers(self) -> RolloutConfig:
        if self.asynchronous.max_staleness and self.engine != "sglang":
            raise ValueError(
                f"asynchronous.max_staleness={self.asynchronous.max_staleness} needs "
                f"engine=sglang: the engine {self.engine} shares the trainer's processes"
            )
        return self

    @model_validator(mode="after")
    def _colocated_servers_take_turns(self) -> RolloutConfig:
        if not self.colocated:
            return self
        problems = []
        if self.engine != "sglang":
            problems.append(f"engine=sglang, not {self.engine}")
        if self.sglang.urls:
            problems.append(
                "sglang.urls empty: it is not known what memory an earlier trainer left to servers "
                "that run already"
            )
        if self.asynchronous.max_staleness:
            problems.append("asynchronous.max_staleness=0: rollout and training take turns")
        if problems:
            raise ValueError(f"colocated=true needs {'; '.join(problems)}")
        return self

    @property
    def truncates(self) -> bool:
        """Can some tokens of the vocabulary not be sampled?"""
        return self.top_p < 1 or self.top_k > 0


class WeightSyncConfig(Section):
    """How rollout servers get new weights (rollout.engine=sglang)."""

    transport: Literal["disk", "broadcast", "ipc"] = "disk"
    """disk: through a shared folder. broadcast: process groups with the servers, nccl between
    GPUs, else gloo. ipc: servers on rank 0's machine read its memory (CUDA IPC, or shared memory);
    for servers that share the trainer's GPUs."""
    broadcast_group: Literal["server", "node", "all"] = "server"
    """broadcast: which servers share a process group. server: each has its own, so that the bytes
    leave rank 0 once a server, and a server that dies costs only itself. node: those of one
    machine. all: all of them. The bytes leave once a group, and a server that dies in a broadcast
    costs its whole group."""
    path: str | None = None
    """disk: a folder that trainer and servers share; default: run_dir/weight_sync."""
    bucket_mib: int = Field(256, ge=1)
    """MiB of tensors that are sent together, or written to one file. Three buckets are on rank 0's
    GPU at a time: one is gathered, one sent, one copied to main memory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of the published tensors; default: the trainer's. It should be the servers'."""
    verify_interval: int = Field(1, ge=0)
    """Versions between comparisons of every tensor that the servers hold with what was sent, by
    checksums; the first publication always. 0: none, as quantised servers need it."""
    parity_interval: int = Field(100, ge=0)
    """Steps between comparisons of server and trainer log-probabilities on fixed text, the first
    before step 0; 0: none."""
    parity_bound: float = Field(0.05, gt=0)
    """Largest mean absolute difference of a token's log-probability; above it the run stops.
    Float32 on both sides stays below 1e-4; bfloat16 kernels differ by about 0.01."""
