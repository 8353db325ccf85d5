"""A folder that transformers saved -> Megatron: equal log-probs; and back: equal bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.hf_bridge import (
    SafetensorsFolder,
    ShardLayout,
    export_hf_tensors,
    family_for,
    load_hf_config,
    load_hf_weights,
)
from megatron_rlsd.runtime.errors import UserError
from tests.unit import tiny_hf

SMOLLM2 = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"


def load(chunks: Sequence[Any], folder: Path, tp_size: int = 1) -> None:
    hf_config = load_hf_config(folder)
    layout = ShardLayout(tp_size=tp_size)
    load_hf_weights(chunks, folder, family_for(hf_config), hf_config, layout=layout)


def export(chunks: Sequence[Any], folder: Path, **options) -> dict[str, Tensor]:
    hf_config = load_hf_config(folder)
    pairs = list(export_hf_tensors(chunks, family_for(hf_config), hf_config, **options))
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def stored(folder: Path) -> dict[str, Tensor]:
    reader = SafetensorsFolder(folder)
    return {name: reader.slice(name) for name in reader.tensors}


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


def log_prob_difference(chunks: Sequence[Any], folder: Path, ids: Tensor) -> float:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        ours = chunks[0](ids, positions).log_softmax(-1)
        theirs = reference(ids).logits.log_softmax(-1)
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_round_trip_and_log_probs(name: str, tiny_folders: dict[str, Path]) -> None:
    folder = tiny_folders[name]
    ids = torch.randint(0, 157, (1, 301), generator=torch.Generator().manual_seed(7))
    with tiny_hf.megatron_model(folder) as chunks:
        load(chunks, folder)
        assert log_prob_difference(chunks, folder, ids) < 1e-4
        exported = export(chunks, folder)
        assert hashes(exported) == hashes(stored(folder))
        for tensor in exported.values():
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_log_prob_comparison_sees_the_rope_scaling(tiny_folders: dict[str, Path]) -> None:
    """The comparison above would pass without rope scaling if it could not see any."""
    folder = tiny_folders["llama_untied_gqa"]
    ids = torch.randint(0, 157, (1, 301), generator=torch.Generator().manual_seed(7))
    with tiny_hf.megatron_model(folder) as chunks:
        load(chunks, folder)
        rotary = chunks[0].rotary_pos_emb
        rotary.inv_freq = 500000.0 ** (-torch.arange(0, 20, 2) / 20)
        rotary.forward.cache_clear()
        assert log_prob_difference(chunks, folder, ids) > 1e-3


@pytest.mark.skipif(
    not (SMOLLM2 / "config.json").is_file(), reason="models/SmolLM2-135M-Instruct is absent"
)
def test_smollm2_on_real_text() -> None:
    text = "The three states of matter are solid, liquid and gas. " * 8
    ids = AutoTokenizer.from_pretrained(SMOLLM2)(text, return_tensors="pt").input_ids
    with tiny_hf.megatron_model(SMOLLM2) as chunks:
        load(chunks, SMOLLM2)
        assert log_prob_difference(chunks, SMOLLM2, ids) < 1e-4
        dtype = SafetensorsFolder(SMOLLM2).slice("model.norm.weight").dtype
        assert hashes(export(chunks, SMOLLM2, dtype=dtype)) == hashes(stored(SMOLLM2))


def test_export_casts_and_survives_later_training(tiny_folders: dict[str, Path]) -> None:
    folder = tiny_folders["qwen3_tied_gqa"]
    with tiny_hf.megatron_model(folder) as chunks:
        load(chunks, folder)
        exported = export(chunks, folder, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.zero_()
    expected = {name: tensor.bfloat16() for name, tensor in stored(folder).items()}
    assert hashes(exported) == hashes(expected)


def test_norms_fused_into_the_linear_layers(tiny_folders: dict[str, Path]) -> None:
    """The parameter names of Transformer Engine's layer specs."""
    folder = tiny_folders["qwen3_untied_mqa"]
    with tiny_hf.megatron_model(folder) as chunks:
        for layer in chunks[0].decoder.layers:
            for norm, linear in (
                ("input_layernorm", layer.self_attention.linear_qkv),
                ("pre_mlp_layernorm", layer.mlp.linear_fc1),
            ):
                linear.layer_norm_weight = getattr(layer, norm).weight
                setattr(layer, norm, nn.Identity())
        load(chunks, folder)
        assert hashes(export(chunks, folder)) == hashes(stored(folder))


def test_wrapped_chunks(tiny_folders: dict[str, Path]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    folder = tiny_folders["llama_tied_mqa"]
    with tiny_hf.megatron_model(folder) as chunks:
        wrapped = [Wrapper(Wrapper(chunks[0]))]
        load(wrapped, folder)
        assert hashes(export(wrapped, folder)) == hashes(stored(folder))
        with pytest.raises(UserError, match="Linear neither is nor wraps"):
            load([nn.Linear(2, 2)], folder)


class Model:
    """A model whose weights are all 0.25, and stay so when a load is refused."""

    def __init__(self, chunks: Sequence[Any], folder: Path) -> None:
        self.chunks, self.folder = chunks, folder

    def assert_refuses(
        self, error: type[Exception], *parts: str, folder: Path | None = None, tp_size: int = 1
    ) -> None:
        with pytest.raises(error) as raised:
            load(self.chunks, folder or self.folder, tp_size)
        for part in parts:
            assert part in str(raised.value)
        assert all(p.eq(0.25).all() for p in self.chunks[0].parameters())


@pytest.fixture
def untied(tiny_folders: dict[str, Path]) -> Iterator[Model]:
    folder = tiny_folders["qwen3_untied_mqa"]
    with tiny_hf.megatron_model(folder) as chunks:
        yield Model(chunks, folder)


def damaged(model: Model, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the model's folder whose tensors went through ``change``."""
    shutil.copytree(model.folder, out, dirs_exist_ok=True)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


Q = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(Q), ("missing", Q)),
        (lambda t: t.pop("lm_head.weight"), ("missing", "lm_head.weight")),
        (lambda t: t.update({"model.surplus": torch.ones(1)}), ("no part", "model.surplus")),
        (
            lambda t: t.update({"model.layers.5.input_layernorm.weight": torch.ones(48)}),
            ("no part", "model.layers.5.input_layernorm.weight"),
        ),
        (
            lambda t: t.update({Q.replace("q_proj", "query"): t.pop(Q)}),
            ("missing", Q, "no part", "model.layers.2.self_attn.query.weight"),
        ),
        (lambda t: t.update({Q: t[Q].T.contiguous()}), (Q, "(48, 60)", "expected (60, 48)")),
        (lambda t: t.update({NORM: torch.ones(49)}), (NORM, "(49,)", "expected (48,)")),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), (Q, "I8", "BF16")),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), (Q, "F8_E4M3")),
    ],
    ids=["missing", "no_head", "extra", "extra_layer", "renamed", "shape", "norm", "int8", "fp8"],
)
def test_wrong_tensors_are_named_and_the_model_is_untouched(
    untied: Model, tmp_path: Path, change: Callable, parts: tuple[str, ...]
) -> None:
    untied.assert_refuses(UserError, *parts, folder=damaged(untied, tmp_path, change))


def test_truncated_file_leaves_the_model_untouched(untied: Model, tmp_path: Path) -> None:
    folder = damaged(untied, tmp_path, lambda t: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    untied.assert_refuses(UserError, str(path), "cut short", folder=folder)


def test_other_sizes_than_the_models(untied: Model, tiny_folders: dict[str, Path]) -> None:
    other = tiny_folders["qwen3_tied_gqa"]
    untied.assert_refuses(UserError, "num_layers=5", "3", folder=other)
    untied.assert_refuses(UserError, "parallel size 2", "num_query_groups=1", tp_size=2)


def test_parameter_outside_the_table(untied: Model, tiny_folders: dict[str, Path]) -> None:
    layer = untied.chunks[0].decoder.layers[1]
    layer.adapter = nn.Linear(2, 2)
    with torch.no_grad():
        layer.adapter.weight.fill_(0.25)
        layer.adapter.bias.fill_(0.25)
    try:
        untied.assert_refuses(UserError, "unknown", "decoder.layers.1.adapter.weight")
    finally:
        del layer.adapter


def test_family_parameter_the_model_lacks(untied: Model) -> None:
    attention = untied.chunks[0].decoder.layers[3].self_attention
    norm, attention.q_layernorm = attention.q_layernorm, None
    try:
        missing = "decoder.layers.3.self_attention.q_layernorm.weight"
        untied.assert_refuses(UserError, "lacks", missing)
    finally:
        attention.q_layernorm = norm


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_inverse_frequencies_of_old_checkpoints_are_ignored(
    tiny_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with tiny_hf.megatron_model(tiny_folders["llama_tied_mqa"]) as chunks:
        model = Model(chunks, tiny_folders["llama_tied_mqa"])
        folder = damaged(model, tmp_path, lambda t: t.update({name: torch.ones(10)}))
        load(chunks, folder)
        assert hashes(export(chunks, folder)) == hashes(stored(model.folder))


def test_head_of_a_tied_checkpoint_must_equal_the_embedding(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    embedding = "model.embed_tokens.weight"

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[embedding].clone()

    def add_other_head(tensors: dict[str, Tensor]) -> None:
        add_head(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    with tiny_hf.megatron_model(tiny_folders["llama_tied_mqa"]) as chunks:
        model = Model(chunks, tiny_folders["llama_tied_mqa"])
        other = damaged(model, tmp_path / "other", add_other_head)
        model.assert_refuses(UserError, "lm_head.weight", embedding, folder=other)
        folder = damaged(model, tmp_path / "equal", add_head)
        load(chunks, folder)
        assert hashes(export(chunks, folder)) == hashes(stored(model.folder))
