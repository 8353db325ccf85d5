"""What the converter refuses by name: sizes, pickles, tokenizers, damage, NaN."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron
from megatron_rlsd.conversion.megatron_weights import MegatronWeights
from megatron_rlsd.hf_bridge import (
    SafetensorsFolder,
    family_for,
    load_hf_config,
    load_hf_weights,
)
from megatron_rlsd.runtime.errors import UserError
from tests.unit import tiny_hf
from tests.unit.conversion.test_hf_convert import hashes, visible


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama_untied_gqa", Sizes(tensor=4), "num_query_groups=2"),
        ("llama_untied_gqa", Sizes(pipeline=6), "from 1 to num_layers=5"),
        ("llama_untied_gqa", Sizes(expert=2), "the model has none"),
        ("qwen3_moe_gqa", Sizes(expert=4), "num_experts=6"),
    ],
)
def test_sizes_that_do_not_divide_the_model(
    tiny_folders: dict[str, Path], tmp_path: Path, name: str, sizes: Sizes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        to_megatron(tiny_folders[name], tmp_path / "out", sizes)
    assert visible(tmp_path) == set()


def pickled_copy(source: Path, out: Path, content: Any = None) -> Path:
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    torch.save(content or load_file(source / "model.safetensors"), out / "pytorch_model.bin")
    return out


def test_pickled_weights_only_where_allowed(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_folders["qwen3_tied_gqa"]
    folder = pickled_copy(source, tmp_path / "pickled")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*--allow-pickle"):
        to_megatron(folder, tmp_path / "out", Sizes())
    to_megatron(folder, tmp_path / "out", Sizes(tensor=2), allow_pickle=True)
    assert hashes(MegatronWeights(tmp_path / "out")) == hashes(SafetensorsFolder(source))


class Harmful:
    """Its unpickling would run code."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HARM"],)


def test_pickles_never_run_code(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    source = tiny_folders["qwen3_tied_gqa"]
    folder = pickled_copy(source, tmp_path / "pickled", {"a": Harmful()})
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds more than tensors"):
        to_megatron(folder, tmp_path / "out", Sizes(), allow_pickle=True)
    to_megatron(source, tmp_path / "out", Sizes())
    with open(tmp_path / "out" / ".metadata", "wb") as file:
        pickle.dump(Harmful(), file)
    with pytest.raises(UserError, match=r"must not refer to posix\.mkdir"):
        to_hf(tmp_path / "out", tmp_path / "hf")
    assert visible(tmp_path) == {"pickled", "out"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 157}}, "added_tokens": []}),
        ("tokenizer.json", {"model": {"vocab": [["x", 0.0]] * 158}}),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 157}]}),
        ("added_tokens.json", {"<new>": 157}),
        ("generation_config.json", {"eos_token_id": [2, 157]}),
    ],
)
def test_tokenizer_that_does_not_fit_the_embedding(
    tiny_folders: dict[str, Path], tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    source = shutil.copytree(tiny_folders["llama_tied_mqa"], tmp_path / "source")
    fitting = json.loads(json.dumps(content).replace("157", "156"))
    if isinstance(fitting.get("model", {}).get("vocab"), list):
        fitting["model"]["vocab"].pop()
    (source / file).write_text(json.dumps(fitting))
    to_megatron(source, tmp_path / "out", Sizes())
    (source / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"embedding of 157 rows: {file}.*157"):
        to_megatron(source, tmp_path / "out2", Sizes())
    assert visible(tmp_path) == {"source", "out"}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def keep_bytes(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: flip(c / "__0_0.distcp", 5000), r"embedding\.word_embeddings\.weight.*corrupt"),
        (lambda c: keep_bytes(c / "__0_0.distcp", 9000), r"__0_0\.distcp is cut short"),
        (lambda c: (c / "__0_0.distcp").unlink(), r"lacks the file __0_0\.distcp"),
        (lambda c: keep_bytes(c / ".metadata", 3000), r"\.metadata is cut short or corrupt"),
        (lambda c: (c / ".metadata").unlink(), r"has no \.metadata"),
        (lambda c: shutil.rmtree(c / "hf"), r"config\.json is missing"),
    ],
    ids=["bit", "truncated", "no_file", "metadata", "no_metadata", "no_config"],
)
def test_damaged_megatron_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path, damage: Callable, message: str
) -> None:
    to_megatron(tiny_folders["llama_tied_mqa"], tmp_path / "megatron", Sizes())
    damage(tmp_path / "megatron")
    with pytest.raises(UserError, match=message):
        to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert visible(tmp_path) == {"megatron"}


def test_config_of_another_model_beside_a_megatron_checkpoint(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    to_megatron(tiny_folders["llama_tied_mqa"], tmp_path / "megatron", Sizes())
    config = tiny_folders["qwen3_untied_mqa"] / "config.json"
    shutil.copyfile(config, tmp_path / "megatron" / "hf" / "config.json")
    with pytest.raises(UserError) as raised:
        to_hf(tmp_path / "megatron", tmp_path / "hf")
    for part in ("missing", "decoder.layers.self_attention.q_layernorm.weight", "output_layer"):
        assert part in str(raised.value)
    assert "(3, 48), expected (5, 48)" in str(raised.value)


@pytest.mark.parametrize("name", ["llama_untied_gqa", "qwen3_moe_gqa", "deepseek_v3_groups"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_by_every_reader(
    name: str, value: float, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders[name], folder)
    tensors = load_file(folder / "model.safetensors")
    broken = next(n for n in tensors if "layers.1" in n and n.endswith("o_proj.weight"))
    tensors[broken][-1, -1] = value
    save_file(tensors, folder / "model.safetensors")
    message = rf"{broken} in .*model: 1 of .* numbers are NaN or infinite"
    with pytest.raises(UserError, match=message):
        to_megatron(folder, tmp_path / "out", Sizes())
    with pytest.raises(UserError, match=message):
        to_megatron(folder, tmp_path / "out", Sizes(), dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()
    hf_config = load_hf_config(folder)
    with (
        tiny_hf.megatron_model(folder) as chunks,
        pytest.raises(UserError, match=message),
    ):
        load_hf_weights(chunks, folder, family_for(hf_config), hf_config)


def test_a_checkpoint_with_a_weight_that_is_no_number_is_not_exported(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_megatron(tiny_folders["llama_tied_mqa"], tmp_path / "checkpoint", Sizes())
    slice_ = MegatronWeights.slice

    def broken(self: MegatronWeights, name: str, *rest: Any) -> torch.Tensor:
        value = slice_(self, name, *rest)
        return value.fill_(float("nan")) if name == "model.norm.weight" else value

    monkeypatch.setattr(MegatronWeights, "slice", broken)
    with pytest.raises(UserError, match=r"model\.norm\.weight in .*checkpoint: 48 of 48 numbers"):
        to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
