"""Models with experts in the embedded engine: checkpoint names, and the routes it records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.routes import routes_shape
from megatron_rlsd.types import GenerationRequest, SamplingParams
from tests.unit.tiny_hf import save_tiny

# Enough to leave and join a batch of two rows; two requests share a prompt.
REQUESTS = [
    GenerationRequest(prompt, SamplingParams(tokens, 0.9), seed)
    for seed, (prompt, tokens) in enumerate(
        [([5, 6, 7], 4), ([5, 6, 7], 9), ([8, 9, 10, 11, 12], 2), ([13], 6)]
    )
]


@pytest.fixture(params=["mixtral_gqa", "qwen3_moe_mixed_mqa"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tiny(request.param, tmp_path)
    return tmp_path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_checkpoints_tensors_make_the_model_that_transformers_loads(folder: Path) -> None:
    shape = routes_shape(load_hf_config(folder))
    loaded = EmbeddedEngine(folder, torch.float32, 2, routes=shape)
    given = EmbeddedEngine(folder, torch.float32, 2, load_weights=False, routes=shape)
    given.update_weights(tensors(folder).items(), 1)
    found, expected = given.generate(REQUESTS), loaded.generate(REQUESTS)
    assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in expected]
    for request, one, other in zip(REQUESTS, found, expected, strict=True):
        assert one.routed_experts is not None
        assert other.routed_experts is not None
        assert torch.equal(one.routed_experts, other.routed_experts)
        assert len(one.routed_experts) == len(request.prompt_ids) + len(one.token_ids) - 1
        # As one sequence, without any cache: the same tokens take the same experts.
        whole = GenerationRequest(
            request.prompt_ids + one.token_ids.tolist(), SamplingParams(1, 0.0), 0
        )
        (again,) = loaded.generate([whole])
        assert again.routed_experts is not None
        assert torch.equal(
            one.routed_experts.sort(dim=-1)[0], again.routed_experts[:-1].sort(dim=-1)[0]
        )
        assert shape.problem(one.routed_experts) is None


def test_experts_that_do_not_fit_are_named(folder: Path) -> None:
    engine = EmbeddedEngine(folder, torch.float32, 2)
    held = tensors(folder)
    name = next(n for n in held if ".experts.1." in n)
    joined = "gate_up_proj" if name.endswith(("gate_proj.weight", "w1.weight")) else "down_proj"
    missing = {n: t for n, t in held.items() if n != name}
    with pytest.raises(EngineError, match=rf"experts\.{joined}: \d+ numbers are missing"):
        engine.update_weights(missing.items(), 1)
    for bad in ({name: held[name][:-1]}, {name.replace(".experts.1.", ".experts.77."): held[name]}):
        with pytest.raises(EngineError, match="misshapen or beyond the model's experts"):
            engine.update_weights((missing | bad).items(), 1)
    assert engine.weight_version == 0
