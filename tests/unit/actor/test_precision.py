"""What can be said of Transformer Engine and FP8 without a GPU: arguments, padding, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlsd.actor.model import dispatcher_fields
from megatron_rlsd.actor.precision import check_fp8, layer_kind, precision_fields
from megatron_rlsd.config import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    parse_config,
)
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.parallel.eight_bit import check_eight_bit, copy_bytes, saved_bytes
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.parallel.memory import layer_products
from megatron_rlsd.runtime.errors import UserError
from tests.unit.tiny_hf import save_tiny

CPU = torch.device("cpu")
BFLOAT16 = {"dtype": "bfloat16"}


def test_on_a_cpu_the_layers_are_local_unless_that_is_refused() -> None:
    assert layer_kind(PrecisionConfig(), CPU) == "local"
    assert layer_kind(PrecisionConfig(layers="local"), CPU) == "local"
    with pytest.raises(UserError, match=r"layers=transformer_engine: .*needs a CUDA device"):
        layer_kind(PrecisionConfig(layers="transformer_engine"), CPU)
    with pytest.raises(UserError, match=r"precision.fp8=current: .*needs a CUDA device"):
        layer_kind(PrecisionConfig(fp8="current"), CPU)


@pytest.mark.parametrize(
    ("fp8", "capability", "engine", "message"),
    [
        ("current", (8, 0), "2.15.0", r"capability 8\.9, this device has 8\.0"),
        ("blockwise", (8, 9), "2.15.0", r"capability 9\.0, this device has 8\.9"),
        ("mxfp8", (9, 0), "2.15.0", r"capability 10\.0, this device has 9\.0"),
        ("blockwise", (9, 0), "2.2.0", r"transformer-engine >= 2\.3, found 2\.2\.0"),
        ("current", (9, 0), "1.13.0+abc", r"transformer-engine >= 2\.2, found 1\.13"),
    ],
)
def test_what_a_device_or_a_release_lacks_is_named(fp8, capability, engine, message) -> None:
    with pytest.raises(UserError, match=message):
        check_fp8(PrecisionConfig(fp8=fp8), capability, engine, "13.0")


def test_hopper_has_all_but_mxfp8() -> None:
    for fp8 in ("current", "blockwise"):
        check_fp8(PrecisionConfig(fp8=fp8), (9, 0), "2.15.0", "13.0")
    check_fp8(PrecisionConfig(fp8="mxfp8"), (10, 0), "2.15.0", "13.0")


@pytest.mark.parametrize("cuda", ["12.8", "12.1", None])
def test_scales_of_blocks_need_a_cuda_that_has_them(cuda: str | None) -> None:
    with pytest.raises(UserError, match=f"CUDA >= 12.9, .*built with {cuda}"):
        check_fp8(PrecisionConfig(fp8="blockwise"), (9, 0), "2.15.0", cuda)
    check_fp8(PrecisionConfig(fp8="current"), (9, 0), "2.15.0", cuda)
    check_fp8(PrecisionConfig(fp8="blockwise"), (9, 0), "2.15.0", "12.9")


@pytest.mark.parametrize(
    ("fp8", "given", "fp8_format"),
    [
        ("current", None, "hybrid"),
        ("blockwise", None, "e4m3"),
        ("mxfp8", None, "e4m3"),
        ("blockwise", "hybrid", "hybrid"),
    ],
)
def test_gradients_have_the_format_of_the_recipe(fp8: str, given: str, fp8_format: str) -> None:
    precision = PrecisionConfig(fp8=fp8, fp8_format=given)
    fields = precision_fields(precision, "transformer_engine", has_experts=False)
    assert fields["fp8"] == fp8_format


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": "current", "layers": "local"}, "needs layers=transformer_engine"),
        ({"fp8": "delayed"}, "a resume would be another run; use current or blockwise"),
        ({"last_layers_bf16": 1}, "mean nothing with fp8=none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**settings)


def test_8_bit_products_need_bfloat16_weights(make_config: Callable[..., Config]) -> None:
    raw = make_config().model_dump(mode="json")
    raw["model"]["precision"] = {"fp8": "current"}
    with pytest.raises(UserError, match="needs dtype=bfloat16, got dtype=float32"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("fp8", "parallel", "multiple"),
    [
        ("none", {}, 1),
        ("current", {}, 16),
        ("mxfp8", {"context": 2}, 64),
        ("blockwise", {"tensor": 2}, 128),
        ("blockwise", {"tensor": 2, "sequence": True}, 256),
        ("mxfp8", {"context": 2, "tensor": 3, "sequence": True}, 192),
        ("current", {"context": 2, "tensor": 3, "sequence": True}, 96),
    ],
)
def test_micro_batches_are_padded_to_what_the_products_take(
    make_config: Callable[..., Config], fp8: str, parallel: dict, multiple: int
) -> None:
    raw = make_config(parallel=parallel).model_dump(mode="json")
    raw["model"] |= {**BFLOAT16, "precision": {"fp8": fp8}}
    assert parse_config(raw).pack_multiple == multiple


@pytest.mark.parametrize("fp8", ["none", "current", "blockwise", "mxfp8"])
def test_megatron_takes_the_fields(fp8: str) -> None:
    kept = {"first_layers_bf16": 1, "last_layers_bf16": 2} if fp8 in ("current", "mxfp8") else {}
    precision = PrecisionConfig(fp8=fp8, fp8_format="e4m3", **kept)
    fields = precision_fields(precision, "transformer_engine", has_experts=False)
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=2, **fields)
    recipe = {"none": None, "current": "tensorwise"}.get(fp8, fp8)
    assert (config.fp8_recipe if config.fp8 else None) == recipe
    assert config.first_last_layers_bf16 == bool(kept)
    assert not config.fp8_param
    if fp8 == "blockwise":
        stored = precision.model_copy(update={"fp8_parameters": True})
        assert precision_fields(stored, "transformer_engine", has_experts=False)["fp8_param"]
    if kept:
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
    assert precision_fields(precision, "local", has_experts=True) == {}


@pytest.mark.parametrize(
    ("fp8", "message"),
    [
        ("none", "needs fp8=blockwise, got fp8=none: there are no 8-bit products"),
        ("current", "its scales are not powers of two"),
        ("mxfp8", "gathers such weights in bfloat16"),
    ],
)
def test_parameters_in_8_bits_need_scales_of_blocks(fp8: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(fp8=fp8, fp8_parameters=True)


def test_parameters_in_8_bits_need_the_distributed_optimizer(
    make_config: Callable[..., Config],
) -> None:
    raw = make_config().model_dump(mode="json")
    raw["model"] |= {**BFLOAT16, "precision": {"fp8": "blockwise", "fp8_parameters": True}}
    with pytest.raises(UserError, match=r"fp8_parameters=true needs optimizer.distributed=true"):
        parse_config(raw)
    raw["optimizer"] = {"distributed": True}
    assert parse_config(raw).model.precision.fp8_parameters
    raw["optimizer"] |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    with pytest.raises(UserError, match=r"does not go with optimizer.overlap_param_gather=true"):
        parse_config(raw)


def test_parameters_in_8_bits_need_a_release_and_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    precision = PrecisionConfig(fp8="blockwise", fp8_parameters=True)
    check_fp8(precision, (9, 0), "2.8.0", "13.0")
    with pytest.raises(UserError, match=r"transformer-engine >= 2\.8, found 2\.7\.1"):
        check_fp8(precision, (9, 0), "2.7.1", "13.0")
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    with pytest.raises(UserError, match="SCALES unset or 0: with scales that are not powers"):
        check_fp8(precision, (9, 0), "2.8.0", "13.0")


def test_experts_are_not_kept_in_8_bits(tmp_path: Path) -> None:
    save_tiny("qwen3_moe_mixed_mqa", tmp_path)
    hf_config = load_hf_config(tmp_path)
    shape = family_for(hf_config).dims(hf_config)
    with pytest.raises(LayoutError, match="not offered for mixtures of experts"):
        check_eight_bit(
            shape, ParallelConfig(), PrecisionConfig(fp8="blockwise", fp8_parameters=True)
        )


def test_what_parameters_in_8_bits_save(make_config: Callable[..., Config]) -> None:
    """A byte of each weight, and of its two copies the one that is now the weight."""
    hf_config = load_hf_config(make_config().model.hf_path)
    shape = family_for(hf_config).dims(hf_config)
    one, layers = ParallelConfig(), range(shape.num_layers)
    kept = PrecisionConfig(fp8="blockwise", last_layers_bf16=1)
    stored = kept.model_copy(update={"fp8_parameters": True})
    weights = 3 * layer_products(shape, one, 0).total
    assert copy_bytes(shape, one, kept, layers) == 2 * weights
    assert copy_bytes(shape, one, stored, layers) == weights
    assert saved_bytes(shape, one, stored, layers) == weights
    assert saved_bytes(shape, one, kept, layers) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_param_gather": True}, "needs distributed=true"),
        ({"overlap_param_gather": True, "distributed": True}, "and overlap_grad_reduce=true"),
        ({"bucket_parameters": 10}, "means nothing with overlap_grad_reduce=false"),
    ],
)
def test_overlap_without_what_it_needs_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_experts_are_padded() -> None:
    precision = PrecisionConfig(fp8="blockwise")
    fields = precision_fields(precision, "transformer_engine", has_experts=True)
    assert fields["moe_router_padding_for_quantization"]


def test_deepep_is_refused_by_name_where_it_is_missing() -> None:
    assert dispatcher_fields(ParallelConfig()) == {"moe_token_dispatcher_type": "alltoall"}
    with pytest.raises(ValueError, match="dispatcher=deepep needs expert > 1"):
        ParallelConfig(dispatcher="deepep")
    with pytest.raises(UserError, match="dispatcher=deepep: the package deep_ep is not"):
        dispatcher_fields(ParallelConfig(expert=2, dispatcher="deepep"))
