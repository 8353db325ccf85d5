"""Experts that were chosen elsewhere: replayed in any layout, in all passes, with gradients.

The reference is transformers in one process, whose routers are made to take the same experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.rollout import EmbeddedEngine
from megatron_rlsd.rollout.routes import routes_shape
from megatron_rlsd.types import GenerationRequest, SamplingParams
from tests.actors import actor_of
from tests.distributed.layouts import Layout, layout_config, per_token, save_models
from tests.distributed.ranks import next_world, run_on_ranks

TEMPERATURE = 0.8
ADVANTAGES = [1.0, -0.6, 0.8, 0.3]
PROMPTS = [[5, 9, 11], [5, 9, 11], [7, 60, 3, 2, 80, 33, 12], [90]]


@dataclass(frozen=True)
class Case:
    """A layout, and what it computes again in the backward pass."""

    layout: Layout
    recompute: dict[str, Any]


EXPERTS: dict[str, Any] = {"model": "experts"}
ONE = [
    Case(Layout(1, **EXPERTS), {}),
    Case(Layout(1, **EXPERTS), {"recompute": "full"}),
    Case(Layout(1, **EXPERTS), {"recompute": "selective", "recompute_modules": ["moe"]}),
]
TWO = [
    Case(Layout(2, tensor=2, expert=2, expert_tensor=1, sequence=True, **EXPERTS), {}),
    Case(Layout(2, context=2, expert=2, **EXPERTS), {}),
    Case(Layout(2, pipeline=2, virtual_pipeline=2, **EXPERTS), {"recompute": "full"}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))["experts"]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ONE, id="one_process", marks=pytest.mark.megatron_range),
        pytest.param(TWO, id="two_processes"),
    ],
)
def test_the_engines_experts_change_nothing_and_others_are_taken(
    cases: list[Case], model: Path, tmp_path: Path
) -> None:
    run_on_ranks(
        *(run_cases, cases[0].layout.world, cases, str(model), str(tmp_path)),
        seconds=400,
        worlds=len(cases) + 1,
    )
    sampled = [Sequence.of(**each) for each in json.loads((tmp_path / "sampled.json").read_text())]
    chosen = torch.load(tmp_path / "routes.pt")
    others = [other_routes(routes, number) for number, routes in enumerate(chosen)]
    expected = reference_update(model, sampled, others)
    for number, case in enumerate(cases):
        found = json.loads((tmp_path / f"case_{number}.json").read_text())
        name = f"{case.layout.key} {case.recompute}"
        engine, alone = torch.tensor(found["engine"]), torch.tensor(found["alone"])
        replayed, forced = torch.tensor(found["replayed"]), torch.tensor(found["forced"])
        # What the engine chose is what the trainer would have chosen.
        torch.testing.assert_close(replayed, alone, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(replayed, engine, atol=1e-5, rtol=0, msg=name)
        # Anything else is taken as it is.
        assert (forced - alone).abs().max() > 0.1, name
        torch.testing.assert_close(forced, expected.log_probs, atol=2e-5, rtol=0, msg=name)
        assert found["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-4), name
        assert found["rerouted"] == pytest.approx(expected.rerouted, abs=1e-6), name
        for layer, gradient in expected.router_gradients.items():
            assert gradient.norm() > 1e-3
            if layer in found["router_gradients"]:
                torch.testing.assert_close(
                    torch.tensor(found["router_gradients"][layer]), gradient, atol=1e-5, rtol=1e-4
                )


def run_cases(cases: list[Case], model: str, out: str) -> None:
    """On every rank: each case in a process group of its own."""
    for number, case in enumerate(cases):
        run_case(case, model, Path(out), number)
        next_world()


def run_case(case: Case, model: str, out: Path, number: int) -> None:
    config = layout_config(case.layout, model)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=case.recompute),
            "algorithm": config.algorithm.model_copy(update={"routing_replay": "rollout"}),
        }
    )
    with actor_of(config, 1, seconds=150) as actor:
        groups = actor.groups
        engine = EmbeddedEngine(
            *(model, torch.float32, 3),
            load_weights=False,
            routes=routes_shape(actor.hf_config),
        )
        engine.update_weights(actor.hf_tensors(), 1)
        params = SamplingParams(24, TEMPERATURE)
        generations = engine.generate(
            [GenerationRequest(prompt, params, seed) for seed, prompt in enumerate(PROMPTS)]
        )
        responses = [g.token_ids.tolist() for g in generations]
        routes = [g.routed_experts for g in generations]
        total = sum(map(len, responses))
        parts = balanced_partition([len(p) for p in PROMPTS], groups.dp.size())

        def sequences(routed: list[Any]) -> list[list[Sequence]]:
            return [
                [Sequence.of(PROMPTS[i], responses[i], routed_experts=routed[i]) for i in part]
                for part in parts
            ]

        def scored(routed: list[Any]) -> list[float] | None:
            values = actor.token_log_probs(sequences(routed), TEMPERATURE)
            return None if values is None else values.tolist()

        others = [other_routes(r, i) for i, r in enumerate(routes)]
        found: dict[str, Any] = {
            "engine": [value for g in generations for value in g.log_probs.tolist()],
            "alone": scored([None] * len(PROMPTS)),
            "replayed": scored(routes),
            "forced": scored(others),
        }
        mine = sequences(others)[groups.dp.rank()]
        updated = actor.update(
            sequences(others),
            TokenValues(
                advantages=per_token([ADVANTAGES[i] for i in parts[groups.dp.rank()]], mine),
                loss_weights=per_token([1 / total] * len(mine), mine),
            ),
            PolicyLossConfig(rlsd_lambda=0.0),
            TEMPERATURE,
        )
        found["grad_norm"] = updated.grad_norm
        found["rerouted"] = updated.sums["rerouted"] / updated.sums["replayed"]
        found["router_gradients"] = {
            name: vars(parameter)["main_grad"].tolist()
            for name, parameter in actor.parameters().items()
            if name.endswith("router.weight") and groups.world_size == 1
        }
        if groups.is_last_stage and groups.tp.rank() == groups.cp.rank() == 0:
            (out / f"case_{number}.json").write_text(json.dumps(found))
            sampled = [
                {"prompt_ids": p, "response_ids": r}
                for p, r in zip(PROMPTS, responses, strict=True)
            ]
            (out / "sampled.json").write_text(json.dumps(sampled))
            torch.save(routes, out / "routes.pt")


def other_routes(routes: torch.Tensor, seed: int) -> torch.Tensor:
    """Two of the four experts drawn for every token and layer; nothing known of every 7th token."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(*routes.shape[:2], 4, generator=generator).argsort(dim=-1)[..., :2]
    drawn[6::7] = -1
    return drawn.to(torch.int16)


@dataclass(frozen=True)
class Expected:
    log_probs: torch.Tensor
    grad_norm: float
    rerouted: float
    router_gradients: dict[str, torch.Tensor]


def reference_update(
    folder: Path, sequences: list[Sequence], routes: list[torch.Tensor]
) -> Expected:
    """One forward and backward pass with these experts, by plain torch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = sum(len(s.response_ids) for s in sequences)
    all_log_probs, tokens, changed = [], 0, 0
    for sequence, routed, advantage in zip(sequences, routes, ADVANTAGES, strict=True):
        with forced_routers(model, routed) as own_choices:
            ids = torch.tensor([sequence.token_ids.tolist()])
            logits = model(ids[:, :-1]).logits[0, len(sequence.prompt_ids) - 1 :] / TEMPERATURE
        targets = ids[0, len(sequence.prompt_ids) :, None]
        log_probs = logits.log_softmax(-1).gather(1, targets)[:, 0]
        all_log_probs.append(log_probs.detach())
        # The ratio to the current policy is 1 in value and log_probs in gradient.
        (-(advantage / total) * log_probs).sum().backward()
        for layer, own in own_choices.items():
            known = routed[:, layer, 0] >= 0
            tokens += int(known.sum())
            taken = routed[known, layer].long().sort(dim=1)[0]
            changed += int((taken != own[known].sort(dim=1)[0]).any(dim=1).sum())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    routers = {
        f"0.decoder.layers.{number}.mlp.router.weight": layer.mlp.gate.weight.grad
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    }
    # Gradients are clipped to a norm of 1 after they were measured.
    scale = min(1.0, 1.0 / float(norm))
    return Expected(
        torch.cat(all_log_probs),
        float(norm),
        changed / tokens,
        {name: gradient * scale for name, gradient in routers.items()},
    )


@contextmanager
def forced_routers(model: Any, routes: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Routers take ``routes`` [tokens, layers, experts]; yields what each would have taken."""
    own_choices: dict[int, torch.Tensor] = {}

    def force(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            logits, _, own = output
            own_choices[layer] = own
            wanted = routes[:, layer].long()
            chosen = torch.where(wanted >= 0, wanted, own)
            weights = logits.softmax(-1).gather(1, chosen)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        return hook

    handles = [
        layer.mlp.gate.register_forward_hook(force(number))
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    try:
        yield own_choices
    finally:
        for handle in handles:
            handle.remove()
