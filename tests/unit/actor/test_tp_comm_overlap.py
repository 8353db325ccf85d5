"""Overlapped tensor parallelism without a GPU: refusals, arguments, and packs of one length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_rlsd.actor.balance import PackShape, plan_micro_batches
from megatron_rlsd.actor.model import transformer_config
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.actor.userbuffers import (
    buffer_arguments,
    check_overlap,
    overlap_fields,
    quantization_modes,
)
from megatron_rlsd.config import Config, PrecisionConfig, parse_config
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.runtime.errors import UserError
from tests.actors import actor_of
from tests.distributed.ranks import next_world, run_on_ranks
from tests.models import save_random_model
from tests.unit.tiny_hf import save_tiny

SPLIT = {"tensor": 2, "sequence": True}
LENGTH = 40


def overlapping(
    make_config: Callable[..., Config], model: dict[str, Any], parallel: dict[str, Any], tokens: int
) -> Config:
    raw = make_config(parallel=parallel).model_dump(mode="json")
    raw["model"] |= {"dtype": "bfloat16", "tp_comm_overlap": True, **model}
    raw["prompts"] |= {"max_prompt_tokens": 512, "max_hint_tokens": 256}
    raw["rollout"]["max_response_tokens"] = 1024
    raw["train"]["max_tokens_per_microbatch"] = tokens
    return parse_config(raw)


@pytest.mark.parametrize(
    ("model", "parallel", "tokens", "message"),
    [
        ({}, {"tensor": 2}, 4096, "needs parallel.sequence=true"),
        ({}, {}, 4096, r"got parallel.tensor=1, parallel.sequence=false"),
        ({"dtype": "float32"}, SPLIT, 4096, "needs dtype=bfloat16"),
        ({"precision": {"layers": "local"}}, SPLIT, 4096, "needs precision.layers=transformer_"),
        ({"precision": {"fp8": "blockwise"}}, SPLIT, 4096, "do not take tensors scaled by blocks"),
        ({"precision": {"fp8": "mxfp8"}}, SPLIT, 4096, "in multiples of 128"),
        ({}, SPLIT, 1791, "must be a multiple of 2 .*needs .*>= 1792, the longest prompt, hint"),
        ({"precision": {"fp8": "current"}}, SPLIT, 1808, "must be a multiple of 32"),
        ({"precision": {"fp8": "current"}}, {**SPLIT, "context": 2}, 1824, "multiple of 64"),
    ],
)
def test_what_userbuffers_do_not_serve_is_refused(
    make_config: Callable[..., Config], model, parallel, tokens, message
) -> None:
    with pytest.raises(UserError, match=message):
        overlapping(make_config, model, parallel, tokens)


def test_without_a_hint_a_micro_batch_need_not_hold_one(
    make_config: Callable[..., Config],
) -> None:
    raw = overlapping(make_config, {}, SPLIT, 4096).model_dump(mode="json")
    raw["train"]["max_tokens_per_microbatch"] = 1536
    with pytest.raises(UserError, match="1792"):
        parse_config(raw)
    raw["teacher"]["hint"] = "none"
    assert parse_config(raw).fixed_pack_length == 1536


def test_the_buffers_hold_one_ranks_part_of_a_micro_batch(
    make_config: Callable[..., Config],
) -> None:
    config = overlapping(make_config, {}, {**SPLIT, "context": 2}, 4096)
    hf_config = load_hf_config(config.model.hf_path)
    family = family_for(hf_config)
    shape = family.dims(hf_config)
    found = buffer_arguments(config, shape)
    assert found == {
        "shape": [2048, hf_config["hidden_size"]],
        "tp_size": 2,
        "dtype": torch.bfloat16,
        "bootstrap_backend": "gloo",
    }
    built = transformer_config(config.model, config.parallel, family, hf_config)
    assert built.tp_comm_overlap
    assert built.tp_comm_bootstrap_backend == "gloo"
    assert overlap_fields(config.model.model_copy(update={"tp_comm_overlap": False})) == {}


@pytest.mark.parametrize(
    ("precision", "modes"),
    [
        ({}, ["NONE"]),
        ({"fp8": "current"}, ["FP8"]),
        ({"fp8": "current", "last_layers_bf16": 1}, ["FP8", "NONE"]),
    ],
)
def test_layers_of_each_precision_get_buffers(precision, modes) -> None:
    assert quantization_modes(PrecisionConfig(**precision)) == modes


def test_models_and_ranks_that_it_cannot_serve_are_named(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    path = make_config().model.hf_path
    hf_config = load_hf_config(path)
    shape = family_for(hf_config).dims(hf_config)
    check_overlap(shape, "transformer_engine", [4, 5])
    with pytest.raises(UserError, match="need a CUDA device"):
        check_overlap(shape, "local", [4, 5])
    with pytest.raises(LayoutError, match=r"takes ranks 4 to 5 .* which is \[5, 6\]"):
        check_overlap(shape, "transformer_engine", [5, 6])
    with pytest.raises(LayoutError, match=r"which is \[0, 2\]"):
        check_overlap(shape, "transformer_engine", [0, 2])
    save_tiny("deepseek_v3_groups", tmp_path)
    latent = load_hf_config(tmp_path)
    with pytest.raises(LayoutError, match="not possible with latent attention"):
        check_overlap(family_for(latent).dims(latent), "transformer_engine", [0, 1])


@given(
    lengths=st.lists(st.lists(st.integers(1, 96), max_size=12), min_size=1, max_size=3),
    stages=st.sampled_from([1, 2]),
)
@settings(max_examples=100, deadline=None)
def test_all_micro_batches_have_the_fixed_length_and_hold_everything(lengths, stages) -> None:
    shape = PackShape(2, 4, equal_lengths=stages > 1, count_multiple=stages, fixed_length=96)
    plan = plan_micro_batches(lengths, 96, shape)
    assert {length for packs in plan.pack_lengths for length in packs} == {96}
    for each, bins in zip(lengths, plan.members, strict=True):
        assert sorted(i for bin_ in bins for i in bin_) == list(range(len(each)))
        assert all(sum(each[i] + each[i] % 2 for i in bin_) <= 96 for bin_ in bins)


def test_a_sequence_that_fits_no_micro_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 98 tokens .*=96 tokens"):
        plan_micro_batches([[5, 97]], 96, PackShape(2, 4, fixed_length=96))


@pytest.mark.process
def test_packs_of_one_length_give_the_same_numbers(tmp_path: Path) -> None:
    """Two ranks that split the sequence: log-probabilities, loss, gradient norm and weights."""
    model = save_random_model(
        transformers.Qwen3Config(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            pad_token_id=None,
        ),
        tmp_path / "model",
    )
    run_on_ranks(train_both, 2, str(model), str(tmp_path), seconds=120, worlds=2)
    plain, fixed = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "fixed"))
    assert plain.keys() == fixed.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(fixed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def train_both(model: str, out: str) -> None:
    """On every rank."""
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": model, "dtype": "float32"},
            "parallel": SPLIT,
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-3},
            "train": {"max_tokens_per_microbatch": LENGTH},
        }
    )
    sequences = [
        Sequence.of([5 + i] * p, [3 * i + j for j in range(r)])
        for i, (p, r) in enumerate([(3, 5), (17, 9), (20, 20), (1, 1), (6, 13)])
    ]
    rows = sum(len(s.response_ids) for s in sequences)
    lengths: dict[str, set[int]] = {}
    for number, name in enumerate(("plain", "fixed")):
        if number:
            next_world()
        with actor_of(config, 2, seconds=60) as actor:
            if name == "fixed":
                actor._pack_shape = replace(actor._pack_shape, fixed_length=LENGTH)
            plan, _ = actor._micro_batches([sequences])
            lengths[name] = set(plan.pack_lengths[0])
            log_probs = actor.token_log_probs([sequences], 1.0)
            values = TokenValues(
                advantages=torch.linspace(-1, 1, rows), loss_weights=torch.full((rows,), 1 / rows)
            )
            results = [
                actor.update([sequences], values, PolicyLossConfig(rlsd_lambda=0.0), 1.0)
                for _ in range(2)
            ]
            weights = {key: tensor.clone() for key, tensor in actor.hf_tensors()}
            if actor.groups.rank == 0:
                weights["log_probs"] = log_probs
                weights["loss"] = torch.tensor([r.sums["weighted_loss"] for r in results])
                weights["grad_norm"] = torch.tensor([r.grad_norm for r in results])
                save_file(weights, Path(out) / f"{name}.safetensors")
    assert lengths["fixed"] == {LENGTH}
    assert len(lengths["plain"]) > 1
