"""One server of two tensor-parallel ranks, of a model with experts, colocated with its trainer.

It is started once and trained with: routes are recorded and replayed, memory is given back while
the trainer trains. Then every transport brings it weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_rlsd import sft
from megatron_rlsd.actor.outcome import UpdateResult
from megatron_rlsd.config import parse_config
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.learner import Learner
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.routes import routes_shape
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.rollout.sglang import SGLangClient, SGLangEngine
from megatron_rlsd.run import Run, assemble
from megatron_rlsd.types import GenerationRequest, SamplingParams
from megatron_rlsd.weight_sync import (
    BroadcastTransport,
    DiskTransport,
    IpcTransport,
    SyncSettings,
    WeightTransport,
)
from tests.batches import rows_of
from tests.conftest import raw_config
from tests.models import save_random_model
from tests.sglang.conftest import VOCAB_SIZE, Publisher, Reference
from tests.sglang.test_weight_sync import server_parameters

STEPS = 2
CALLS = {
    "/generate": "generate",
    "/release_memory_occupation": "release",
    "/resume_memory_occupation": "resume",
    "/update_weights_from_tensor": "weights",
    "/weights_checker": "compare",
    "/health": "health",
}


def save_experts(folder: Path, tokenizer_of: Path) -> None:
    """A Qwen3-MoE, whose experts and heads two ranks share, with another model's tokenizer."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=load_hf_config(tokenizer_of)["eos_token_id"],
        pad_token_id=None,
    )
    save_random_model(config, folder, tokenizer_of=tokenizer_of)


@dataclass
class Colocated:
    run: Run
    hf_path: Path
    events: list[str] = field(default_factory=list)
    """What the server was asked for, and ``update``, in order."""

    @property
    def engine(self) -> SGLangEngine:
        assert isinstance(self.run.engine, ServedEngine)
        return self.run.engine._rank_zero_servers


@pytest.fixture(scope="module")
def colocated(
    sglang_environment: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Colocated]:
    folder = tmp_path_factory.mktemp("colocated")
    save_experts(folder / "model", tiny_model)
    raw: dict[str, Any] = raw_config(folder / "model", folder)
    raw["rollout"] |= {
        "engine": "sglang",
        "colocated": True,
        "sglang": {
            "device": "cpu",
            "tensor_parallel": 2,
            "env": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
            # Often enough that one would fall into the server's sleep.
            "health_interval_seconds": 0.1,
            "start_timeout_seconds": 500,
            "generate_timeout_seconds": 120,
        },
    }
    # Every response has an advantage, whatever its reward: each one is replayed.
    raw["algorithm"] |= {"routing_replay": "rollout", "advantage": "one"}
    raw["weight_sync"] = {"transport": "ipc", "parity_interval": 1, "parity_bound": 1e-4}
    raw["optimizer"] = {"lr": 1e-2}
    raw["distributed"] = {"timeout_seconds": 600}
    config = parse_config(raw)
    events: list[str] = []
    asked, urls = SGLangClient._request, set[str]()

    async def noted(self: SGLangClient, method: str, path: str, body: Any, *limits: Any) -> bytes:
        # Servers of other tests are still there, and are looked at now and then.
        if path in CALLS and self.url in urls:
            tags = (body or {}).get("tags", [])
            events.append(" ".join([CALLS[path], *tags]))
        return await asked(self, method, path, body, *limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGLangClient, "_request", noted)
        with assemble(config, total_updates=STEPS, total_steps=STEPS) as run:
            colocated = Colocated(run, folder / "model", events)
            urls.update(server.url for server in colocated.engine.fleet.servers)
            yield colocated


def test_a_colocated_server_sleeps_while_the_trainer_trains(colocated: Colocated) -> None:
    run, events = colocated.run, colocated.events
    learner = Learner(run.config, run.actor)
    run.colocation.servers_take_over()
    run.publish_weights(version=0)
    assert run.actor._offload.offloaded
    for step in range(STEPS):
        events.clear()
        _, batch, _ = run.rollout(step)
        assert all(row.routed_experts is not None for row in rows_of(batch))
        assert {row.advantage for row in rows_of(batch)} == {1.0}
        run.colocation.trainer_takes_over()
        assert not run.actor._offload.offloaded
        plan = run.hand_out(learner.plan(batch, step, 0.5))
        metrics = learner.update(plan, learner.score(plan))
        events.append("update")
        run.colocation.servers_take_over()
        metrics |= run.publish_weights(version=step + 1)
        ordered = [event for event in events if event != "health"]
        assert list(dict.fromkeys(ordered)) == [
            "generate",
            "release weights kv_cache",
            "update",
            "resume weights",
            "weights",
            "compare",
            "resume kv_cache",
        ]
        asleep = events[events.index("release weights kv_cache") : events.index("resume kv_cache")]
        assert "health" not in asleep
        # The server's choices are the trainer's, and so are its log-probabilities.
        assert metrics["train/routing_mismatch_share"] == 0
        assert metrics["train/rollout_log_prob_diff_max"] < 1e-4
        assert metrics["weight_sync/parity_max"] < 1e-4
        assert metrics["weight_sync/unverified_tensors"] == 0
        assert metrics["train/grad_norm"] > 0


def test_a_colocated_server_sleeps_while_the_warm_start_trains(
    colocated: Colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, events = colocated.run, colocated.events
    events.clear()
    update = sft.supervised_update

    def noted(*arguments: Any) -> UpdateResult:
        assert not run.actor._offload.offloaded
        events.append("update")
        return update(*arguments)

    monkeypatch.setattr(sft, "supervised_update", noted)
    monkeypatch.setattr(sft, "assemble", lambda *_, **__: nullcontext(run))
    raw = run.config.model_dump(mode="json")
    raw["sft"] |= {"steps": 2, "batch_size": 2}
    raw["eval"] |= {"interval": 1, "at_start": False, "num_problems": 2}
    sft.train(parse_config(raw))
    ordered = [event for event in events if event not in ("health", "generate")]
    published = ["weights", "compare", "resume kv_cache"]
    turns = [each for each, _ in itertools.groupby(ordered)]
    trained = ["release weights kv_cache", "update", "resume weights", *published]
    # Its first weights find the server awake.
    assert turns == ["weights", "compare", *2 * trained]


@pytest.mark.parametrize("kind", ["disk", "broadcast", "ipc"])
def test_two_ranks_get_every_tensor_and_record_routes(
    kind: str, colocated: Colocated, sync_settings: SyncSettings, tmp_path: Path
) -> None:
    engine, hf_path = colocated.engine, colocated.hf_path
    settings = replace(sync_settings, source=hf_path)
    transport: WeightTransport = {
        "disk": lambda: DiskTransport(engine, settings, tmp_path),
        "broadcast": lambda: BroadcastTransport(engine, settings),
        "ipc": lambda: IpcTransport(engine, settings),
    }[kind]()
    trainer = EmbeddedEngine(
        hf_path, torch.float32, 4, routes=routes_shape(load_hf_config(hf_path))
    )
    publisher = Publisher(transport, engine, Reference.of(trainer._model))
    publisher.change()
    # The run's own publications were small numbers.
    transport.publish(checkpoint_tensors(trainer._model), 1000 + publisher.version)
    assert transport.metrics["weight_sync/verified_tensors"] == server_parameters(engine)
    assert transport.metrics["weight_sync/unverified_tensors"] == 0

    assert colocated.run.builder is not None
    params = replace(colocated.run.builder.sampling, temperature=0.9)
    prompts = ([11, 12, 13], [11, 12, 13], [40, 3, 150, 9, 8])
    asked = [GenerationRequest(prompt, params, seed) for seed, prompt in enumerate(prompts)]
    generations = engine.generate(asked)
    publisher.reference.check(asked, generations)
    # The same tokens as one prompt: what transformers' routers choose for each of them.
    whole = [
        GenerationRequest(r.prompt_ids + g.token_ids.tolist(), SamplingParams(1, 0.0), 0)
        for r, g in zip(asked, generations, strict=True)
    ]
    for generation, expected in zip(generations, trainer.generate(whole), strict=True):
        found, wanted = generation.routed_experts, expected.routed_experts
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.sort(dim=-1)[0], wanted[:-1].sort(dim=-1)[0])
    transport.close()


def checkpoint_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' joined experts one by one, as a trainer publishes them."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            yield name, parameter
            continue
        prefix, _, joined = name.rpartition(".")
        for number, expert in enumerate(parameter.detach()):
            if joined == "down_proj":
                yield f"{prefix}.{number}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{prefix}.{number}.gate_proj.weight", gate
                yield f"{prefix}.{number}.up_proj.weight", up
