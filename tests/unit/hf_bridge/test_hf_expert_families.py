"""Experts and latent attention: that the log-prob comparison sees them, and what is special."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.hf_bridge import (
    ShardLayout,
    export_hf_tensors,
    family_for,
    load_hf_config,
    load_hf_weights,
)
from megatron_rlsd.hf_bridge.parameters import local_parameters
from megatron_rlsd.runtime.errors import UserError
from tests.unit import tiny_hf

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def load(chunks: list[Any], folder: Path) -> None:
    hf_config = load_hf_config(folder)
    load_hf_weights(chunks, folder, family_for(hf_config), hf_config)


def exported(chunks: list[Any], folder: Path, **options: Any) -> dict[str, Tensor]:
    hf_config = load_hf_config(folder)
    return dict(export_hf_tensors(chunks, family_for(hf_config), hf_config, **options))


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


def copy_of(folder: Path, out: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    """The folder with other config values and more tensors."""
    shutil.copytree(folder, out)
    (out / "config.json").write_text(json.dumps(load_hf_config(folder) | config))
    path = out / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)
    return out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral_untied_mqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("qwen3_moe_gqa", {"norm_topk_prob": False}),
        ("qwen3_moe_gqa", {"num_experts_per_tok": 2}),
        ("mixtral_gqa", {"num_experts_per_tok": 3}),
        ("deepseek_v3_groups", {"topk_group": 4}),
        ("deepseek_v3_groups", {"routed_scaling_factor": 2.4}),
        ("deepseek_v3_groups", {"rope_parameters": {**tiny_hf.YARN, "mscale_all_dim": 0.7}}),
        ("deepseek_v3_groups", {"rope_parameters": {**tiny_hf.YARN, "factor": 20.0}}),
    ],
)
def test_the_log_prob_comparison_sees_this_setting(
    name: str, changes: dict[str, Any], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Else equal log-probs would say nothing about how the setting is mapped."""
    other = copy_of(tiny_folders[name], tmp_path / "other", changes)
    ids = torch.randint(0, 157, (1, 200), generator=torch.Generator().manual_seed(7))
    reference = AutoModelForCausalLM.from_pretrained(tiny_folders[name], dtype=torch.float32)
    with tiny_hf.megatron_model(other) as chunks, torch.no_grad():
        load(chunks, other)
        ours = chunks[0](ids, torch.arange(200)[None]).log_softmax(-1)
        theirs = reference.eval()(ids).logits.log_softmax(-1)
    assert (ours - theirs).abs().max() > 1e-3


def test_the_expert_bias_stays_float32_in_a_16_bit_model(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Rounded to bfloat16 it would send tokens to other experts."""
    folder = tiny_folders["deepseek_v3_groups"]
    stored = load_file(folder / "model.safetensors")
    with tiny_hf.megatron_model(folder) as chunks:
        chunks[0].bfloat16()  # as Megatron's Float16Module does, buffers included
        load(chunks, folder)
        tensors = exported(chunks, folder)
        for tensor in exported(chunks, folder, dtype=torch.float32).values():
            assert tensor.dtype == torch.float32
    assert tensors[BIAS].dtype == torch.float32
    assert tensor_hash(tensors[BIAS]) == tensor_hash(stored[BIAS])
    assert not torch.equal(stored[BIAS], stored[BIAS].bfloat16().float())
    others = {name: tensor.bfloat16() for name, tensor in stored.items() if "bias" not in name}
    assert hashes(others).items() < hashes(tensors).items()


def test_layers_for_multi_token_prediction_are_left_out(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folders["deepseek_v3_one_group"]
    one = {"num_nextn_predict_layers": 1}
    mtp = {"model.layers.2.eh_proj.weight": torch.ones(48, 96)}
    beyond = {"model.layers.3.eh_proj.weight": torch.ones(48, 96)}
    with_mtp = copy_of(folder, tmp_path / "with", one, **mtp)
    with tiny_hf.megatron_model(with_mtp) as chunks:
        load(chunks, with_mtp)
        tensors = exported(chunks, with_mtp)
        assert hashes(tensors) == hashes(load_file(folder / "model.safetensors"))
        for refused in (
            copy_of(folder, tmp_path / "none_announced", {}, **mtp),
            copy_of(folder, tmp_path / "one_too_many", one, **beyond),
        ):
            with pytest.raises(UserError, match=r"no part .*eh_proj"):
                load(chunks, refused)


def test_quantized_weights_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_folders["deepseek_v3_groups"]
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    eighth = {name: load_file(folder / "model.safetensors")[name].to(torch.float8_e4m3fn)}
    scaled = copy_of(
        folder, tmp_path / "fp8", {}, **eighth, **{f"{name}_scale_inv": torch.ones(1, 1)}
    )
    with tiny_hf.megatron_model(folder) as chunks, pytest.raises(UserError) as error:
        load(chunks, scaled)
    for part in (f"{name} has dtype F8_E4M3", f"{name}_scale_inv"):
        assert part in str(error.value)


def test_grouped_expert_parameters(tiny_folders: dict[str, Path]) -> None:
    """The parameter names where one module computes all experts (Transformer Engine)."""
    folder = tiny_folders["qwen3_moe_mixed_mqa"]

    class Grouped(nn.Module):
        def __init__(self, experts: nn.ModuleList, linear: str) -> None:
            super().__init__()
            for number, expert in enumerate(experts):
                self.register_parameter(f"weight{number}", getattr(expert, linear).weight)

    with tiny_hf.megatron_model(folder) as chunks:
        for layer in chunks[0].decoder.layers:
            if hasattr(layer.mlp, "experts"):
                local = layer.mlp.experts.local_experts
                layer.mlp.experts = nn.Module()
                layer.mlp.experts.linear_fc1 = Grouped(local, "linear_fc1")
                layer.mlp.experts.linear_fc2 = Grouped(local, "linear_fc2")
        load(chunks, folder)
        assert hashes(exported(chunks, folder)) == hashes(load_file(folder / "model.safetensors"))


def test_a_rank_without_its_experts_is_told_which(tiny_folders: dict[str, Path]) -> None:
    folder = tiny_folders["qwen3_moe_gqa"]
    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    dims = family.dims(hf_config)
    with tiny_hf.megatron_model(folder) as chunks:
        for layer in chunks[0].decoder.layers:
            del layer.mlp.experts.local_experts[2:]
        second = ShardLayout(ep_rank=1, ep_size=3)
        held = local_parameters(chunks, family, dims, second)
        assert {entry.expert for entry, _ in held} == {None, 2, 3}
        with pytest.raises(UserError, match=r"local_experts\.2\.linear_fc1") as error:
            local_parameters(chunks, family, dims, ShardLayout(ep_rank=0, ep_size=2))
        assert "local_experts.1." not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ShardLayout(ep_size=4), "expert parallel size 4 must divide num_experts=6"),
        (ShardLayout(etp_size=3), "expert tensor parallel size 3 must divide expert_ffn_size=28"),
        (ShardLayout(tp_size=3), "tensor parallel size 3 must divide num_query_groups=2"),
    ],
)
def test_layouts_that_cannot_split_the_experts(
    layout: ShardLayout, message: str, tiny_folders: dict[str, Path]
) -> None:
    hf_config = load_hf_config(tiny_folders["qwen3_moe_gqa"])
    with pytest.raises(UserError, match=message):
        family_for(hf_config).dims(hf_config).check(layout)


def test_a_dense_width_that_no_layer_uses_need_not_be_divisible(
    tiny_folders: dict[str, Path],
) -> None:
    hf_config = load_hf_config(tiny_folders["qwen3_moe_gqa"]) | {"intermediate_size": 89}
    dims = family_for(hf_config).dims(hf_config, padded_vocab_size=158)
    dims.check(ShardLayout(tp_size=2))


def test_experts_of_a_dense_model() -> None:
    hf_config = tiny_hf.tiny_config("llama_tied_mqa").to_dict()
    hf_config["architectures"] = ["LlamaForCausalLM"]
    dims = family_for(hf_config).dims(hf_config)
    with pytest.raises(UserError, match="expert parallel size 2 needs a mixture"):
        dims.check(ShardLayout(ep_size=2))
