"""Fused kernels run where they are found, fit the model and are not switched off."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import nn

from megatron_rlsd.actor.fusions import (
    PROBES,
    add_weight_gradients_in_place,
    fusion_fields,
    fusions,
)
from megatron_rlsd.config import Fusion, ModelConfig
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from tests.unit.tiny_hf import MODELS, save_tiny


def model(*disabled: str) -> ModelConfig:
    return ModelConfig.model_validate({"hf_path": "x", "disabled_fusions": list(disabled)})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Transformer Engine that has everything that is asked for."""
    for module, attribute in PROBES.values():
        monkeypatch.setattr(import_module(module), attribute, object())
    return monkeypatch


def running(settings: ModelConfig, *, latent: bool = False, has_experts: bool = False) -> set[str]:
    found = fusions(settings, "transformer_engine", latent=latent, has_experts=has_experts)
    return {name for name, reason in found.items() if reason is None}


def test_what_fits_the_model_runs(engine: Any) -> None:
    assert running(model()) == {"rope", "activation", "weight_gradient"}
    assert running(model(), has_experts=True) == set(get_args(Fusion))
    assert "rope" not in running(model(), latent=True, has_experts=True)


def test_local_layers_have_none(engine: Any) -> None:
    assert not any(fusion_fields(model(), "local", latent=False, has_experts=True).values())


@pytest.mark.parametrize("name", get_args(Fusion))
def test_each_can_be_switched_off(engine: Any, name: str) -> None:
    assert running(model(name), has_experts=True) == set(get_args(Fusion)) - {name}


@pytest.mark.parametrize("name", PROBES)
def test_what_a_release_lacks_is_named(engine: Any, name: Any) -> None:
    module, attribute = PROBES[name]
    engine.setattr(import_module(module), attribute, None)
    has_experts = name.startswith("moe")
    found = fusions(model(), "transformer_engine", latent=False, has_experts=has_experts)
    assert found[name] == "this release of Transformer Engine does not have it"


def test_megatron_gets_one_form_of_swiglu(engine: Any) -> None:
    for has_experts in (False, True):
        fields = fusion_fields(model(), "transformer_engine", latent=False, has_experts=has_experts)
        assert fields["use_te_activation_func"] != fields["bias_activation_fusion"]
        assert fields["moe_grouped_gemm"] == has_experts


@pytest.mark.parametrize("kind", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", MODELS)
def test_no_field_of_a_family_is_given_twice(
    engine: Any, name: str, kind: Any, tmp_path: Path
) -> None:
    """TransformerConfig takes each keyword once, whichever layers it is for."""
    save_tiny(name, tmp_path)
    hf_config = load_hf_config(tmp_path)
    fields = family_for(hf_config).transformer_config_fields(hf_config)
    assert not set(fields) & set(fusion_fields(model(), kind, latent=False, has_experts=True))


def test_gradients_are_added_in_place_by_layers_that_can() -> None:
    class Product(nn.Linear):
        fuse_wgrad_accumulation = False

    chunk = nn.Sequential(Product(2, 2), nn.Linear(2, 2))
    add_weight_gradients_in_place(chunk)
    assert chunk[0].fuse_wgrad_accumulation
    assert not hasattr(chunk[1], "fuse_wgrad_accumulation")
