"""Whole checkpoints there and back: what Megatron itself would save, and every bit of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron
from megatron_rlsd.conversion.megatron_weights import MegatronWeights
from megatron_rlsd.hf_bridge import (
    SafetensorsFolder,
    Weights,
    family_for,
    load_hf_config,
    load_hf_weights,
)
from megatron_rlsd.runtime.errors import UserError
from tests.unit import tiny_hf

LAYOUTS = {
    "llama_tied_mqa": Sizes(pipeline=2),
    "llama_untied_gqa": Sizes(tensor=2, pipeline=5),
    "qwen2_tied_gqa": Sizes(tensor=2),
    "qwen3_moe_gqa": Sizes(tensor=2, pipeline=2, expert=3),
    "mixtral_gqa": Sizes(tensor=2, expert_tensor=2),
    "deepseek_v3_groups": Sizes(tensor=2, expert=4, expert_tensor=1),
}
"""Those not named here: one rank."""


def hashes(weights: Weights) -> dict[str, str]:
    return {name: tensor_hash(weights.slice(name)) for name in weights.tensors}


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saved_by_megatron(chunks: list[Any]) -> tuple[dict[str, Any], set[str]]:
    """Key -> (global shape, its pieces), and the keys of objects, from the model itself."""
    tensors: dict[str, Any] = {}
    objects = set()
    for base in nested_values(chunks[0].sharded_state_dict(metadata={})):
        built = nested_values(base.build()) if isinstance(base, ShardedTensorFactory) else [base]
        for part in built:
            if isinstance(part, ShardedObject):
                objects.add(part.unique_key)
                continue
            axes = (1,) * part.prepend_axis_num
            _, pieces = tensors.setdefault(part.key, (tuple(part.global_shape), set()))
            pieces.add((tuple(part.global_offset), (*axes, *part.local_shape)))
    return tensors, objects


def saved_by_converter(folder: Path) -> tuple[dict[str, Any], set[str]]:
    tensors: dict[str, Any] = {}
    objects = set()
    for key, about in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if isinstance(about, BytesStorageMetadata):
            objects.add(key)
        else:
            pieces = {(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks}
            tensors[key] = (tuple(about.size), pieces)
    return tensors, objects


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_megatron_would_save_and_does_load_the_same(
    name: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_folders[name]
    to_megatron(source, tmp_path / "one_rank", Sizes())
    to_megatron(source, tmp_path / "layout", LAYOUTS.get(name, Sizes()))
    hf_config = load_hf_config(source)
    with tiny_hf.megatron_model(source) as chunks:
        model = chunks[0]
        assert saved_by_converter(tmp_path / "one_rank") == saved_by_megatron(chunks)
        load_hf_weights(chunks, source, family_for(hf_config), hf_config)
        expected = {n: t.clone() for n, t in model.state_dict().items() if t is not None}
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor is not None:
                    tensor.fill_(-7)
        state = model.sharded_state_dict(metadata={})
        model.load_state_dict(dist_checkpointing.load(state, str(tmp_path / "layout")))
        for tensor_name, tensor in expected.items():
            assert torch.equal(model.state_dict()[tensor_name], tensor), tensor_name
    for checkpoint in ("one_rank", "layout"):
        assert hashes(MegatronWeights(tmp_path / checkpoint)) == hashes(SafetensorsFolder(source))
    to_hf(tmp_path / "layout", tmp_path / "back", max_shard_bytes=30_000)
    assert hashes(SafetensorsFolder(tmp_path / "back")) == hashes(SafetensorsFolder(source))
    assert load_hf_config(tmp_path / "back") == hf_config
    assert visible(tmp_path) == {"one_rank", "layout", "back"}


def test_transformers_loads_what_comes_back(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_folders["qwen3_moe_gqa"]
    to_megatron(source, tmp_path / "megatron", Sizes(expert=2))
    to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "hf", source))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_vocabulary_is_padded_for_megatron_and_cut_again(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    to_megatron(tiny_folders["llama_untied_gqa"], tmp_path / "megatron", Sizes(tensor=2))
    tensors, _ = saved_by_converter(tmp_path / "megatron")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        shape, pieces = tensors[key]
        assert shape == (158, 48)
        assert pieces == {((0, 0), (79, 48)), ((79, 0), (79, 48))}
    weights = MegatronWeights(tmp_path / "megatron")
    padded = weights._stored.read_piece("output_layer.weight", 1, ())
    assert padded.shape == (79, 48)
    assert not padded[-1].any()
    assert padded[-2].all()
    assert weights.slice("lm_head.weight").shape == (157, 48)


def test_cast_on_the_way_leaves_full_precision_alone(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_folders["deepseek_v3_groups"]
    to_megatron(source, tmp_path / "megatron", Sizes(), dtype=torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.float16)
    megatron, hf = MegatronWeights(tmp_path / "megatron"), SafetensorsFolder(tmp_path / "hf")
    kept = 0
    for name in hf.tensors:
        value = SafetensorsFolder(source).slice(name)
        if name.endswith("e_score_correction_bias"):
            kept += 1
            assert tensor_hash(hf.slice(name)) == tensor_hash(value.float())
            continue
        assert tensor_hash(megatron.slice(name)) == tensor_hash(value.bfloat16())
        assert tensor_hash(hf.slice(name)) == tensor_hash(value.bfloat16().half())
    assert kept > 0
    assert load_hf_config(tmp_path / "hf")["dtype"] == "float16"


def changed(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_number_too_large_for_the_dtype_is_named(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = 1e6

    source = changed(tiny_folders["llama_tied_mqa"], tmp_path / "source", grow)
    with pytest.raises(UserError, match=f"{name} holds 1e.06, which torch.float16"):
        to_megatron(source, tmp_path / "out", Sizes(), dtype=torch.float16)
    assert visible(tmp_path) == {"source"}
    to_megatron(source, tmp_path / "out", Sizes(), dtype=torch.bfloat16)


def test_layers_of_different_dtypes_share_the_wider_one(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    narrow = "model.layers.0.self_attn.o_proj.weight"
    source = changed(
        tiny_folders["llama_tied_mqa"],
        tmp_path / "source",
        lambda t: t.update({narrow: t[narrow].bfloat16()}),
    )
    to_megatron(source, tmp_path / "out", Sizes())
    for name, value in load_file(source / "model.safetensors").items():
        assert torch.equal(MegatronWeights(tmp_path / "out").slice(name), value.float())


class Stop(BaseException):
    """Stands for a killed process."""


def stop_after(nbytes: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > nbytes:
            raise Stop

    return progress


def times(folder: Path, pattern: str) -> dict[str, int]:
    """File name -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.mark.parametrize("torn_journal", [False, True])
def test_interrupted_conversion_goes_on(
    tiny_folders: dict[str, Path], tmp_path: Path, torn_journal: bool
) -> None:
    source = tiny_folders["llama_untied_gqa"]
    options: dict[str, Any] = {"file_bytes": 60_000}
    to_megatron(source, tmp_path / "whole", Sizes(tensor=2), **options)
    with pytest.raises(Stop):
        to_megatron(
            source, tmp_path / "out", Sizes(tensor=2), progress=stop_after(250_000), **options
        )
    assert not (tmp_path / "out").exists()
    kept = times(tmp_path / ".out.partial", "*.distcp")
    assert len(kept) > 3
    if torn_journal:
        journal = tmp_path / ".out.journal"
        journal.write_text(journal.read_text()[:-20])
    to_megatron(source, tmp_path / "out", Sizes(tensor=2), **options)
    done = times(tmp_path / "out", "*.distcp")
    rewritten = [name for name, time in kept.items() if done[name] != time]
    assert len(rewritten) == (2 if torn_journal else 1)
    for path in (tmp_path / "whole").glob("*.distcp"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert hashes(MegatronWeights(tmp_path / "out")) == hashes(SafetensorsFolder(source))
    assert visible(tmp_path) == {"whole", "out"}


def test_interrupted_export_goes_on(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_folders["llama_untied_gqa"]
    to_megatron(source, tmp_path / "megatron", Sizes())
    with pytest.raises(Stop):
        to_hf(
            tmp_path / "megatron",
            tmp_path / "out",
            max_shard_bytes=60_000,
            progress=stop_after(250_000),
        )
    kept = times(tmp_path / ".out.partial", "*.safetensors")
    to_hf(tmp_path / "megatron", tmp_path / "out", max_shard_bytes=60_000)
    done = times(tmp_path / "out", "*.safetensors")
    assert sum(done[name] == time for name, time in kept.items()) == len(kept) - 1 > 2
    assert hashes(SafetensorsFolder(tmp_path / "out")) == hashes(SafetensorsFolder(source))
    assert visible(tmp_path) == {"megatron", "out"}


@pytest.mark.parametrize("change", ["settings", "source"])
def test_other_source_or_settings_start_afresh(
    tiny_folders: dict[str, Path], tmp_path: Path, change: str
) -> None:
    source = shutil.copytree(tiny_folders["llama_untied_gqa"], tmp_path / "source")
    options: dict[str, Any] = {"file_bytes": 60_000}
    with pytest.raises(Stop):
        to_megatron(source, tmp_path / "out", Sizes(), progress=stop_after(250_000), **options)
    (tmp_path / ".out.partial" / "hf").mkdir()
    if change == "settings":
        options["dtype"] = torch.bfloat16
    else:
        tensors = load_file(source / "model.safetensors")
        save_file({n: t + 1 for n, t in tensors.items()}, source / "model.safetensors")
    to_megatron(source, tmp_path / "out", Sizes(), **options)
    dtype = options.get("dtype")
    expected = {
        name: tensor_hash(value if dtype is None else value.to(dtype))
        for name, value in load_file(source / "model.safetensors").items()
    }
    assert hashes(MegatronWeights(tmp_path / "out")) == expected


def test_two_conversions_into_one_folder(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_folders["llama_tied_mqa"]

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another conversion is writing"):
            to_megatron(source, tmp_path / "out", Sizes())

    to_megatron(source, tmp_path / "out", Sizes(), progress=meanwhile)
    assert hashes(MegatronWeights(tmp_path / "out")) == hashes(SafetensorsFolder(source))


def test_what_is_in_the_way(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_folders["llama_tied_mqa"]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="left alone"):
        to_megatron(source, tmp_path, Sizes())
    with pytest.raises(UserError, match="is the source folder"):
        to_megatron(source, source, Sizes())
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB and .* has 0\.00 GB free"):
        to_megatron(source, tmp_path / "out", Sizes())
    assert visible(tmp_path) == {"thesis.txt"}


def test_a_folder_that_exists_is_replaced_only_when_asked_and_keeps_what_is_no_model(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny_folders["llama_untied_gqa"]
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    back.mkdir()  # an empty folder is in nobody's way
    to_megatron(source, megatron, Sizes(tensor=2))
    to_hf(megatron, back, max_shard_bytes=30_000)
    mine = {"notes.txt": "a", "runs/one/log.txt": "b", "README.md": "c", ".hidden": "d"}
    stale = {"tokenizer.model": "of another model", "model-00009-of-00009.safetensors": "x"}
    for folder, extra in ((megatron, {"hf/mine.txt": "e", "__9_0.distcp": "x"}), (back, stale)):
        for name, text in (mine | extra).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for convert in (
        lambda **how: to_megatron(source, megatron, Sizes(), **how),
        lambda **how: to_hf(megatron, back, **how),
    ):
        with pytest.raises(UserError, match="exists; choose another folder, or give --overwrite"):
            convert()
        assert before == {path: path.read_bytes() for path in before}
    assert to_megatron(source, megatron, Sizes(), overwrite=True) == [
        ".hidden", "README.md", "hf/mine.txt", "notes.txt", "runs",
    ]  # fmt: skip
    assert to_hf(megatron, back, overwrite=True) == [".hidden", "README.md", "notes.txt", "runs"]
    for folder in (megatron, back):
        assert {name: (folder / name).read_text() for name in mine} == mine
    assert (megatron / "hf/mine.txt").read_text() == "e"
    assert hashes(MegatronWeights(megatron)) == hashes(SafetensorsFolder(source))
    assert hashes(SafetensorsFolder(back)) == hashes(SafetensorsFolder(source))
    assert not (megatron / "__9_0.distcp").exists()
    assert not any((back / name).exists() for name in stale)


PEAK = """
import sys
from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron

def peak():
    fields = dict(l.split(":") for l in open("/proc/self/status").read().splitlines() if ":" in l)
    return int(fields["VmHWM"].split()[0]) * 1024

hf, megatron, back = sys.argv[1:]
before = peak()
to_megatron(hf, megatron, Sizes(tensor=2))
middle = peak()
to_hf(megatron, back)
print(middle - before, peak() - before)
"""


@pytest.mark.process
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 300 MB whose largest tensor has 10 MB."""
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 5001,
        "hidden_size": 512,
        "intermediate_size": 1400,
        "num_hidden_layers": 23,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    family = family_for(hf_config)
    shapes = family.hf_shapes(family.dims(hf_config))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert size > 290e6
    del tensors
    paths = [str(source), str(tmp_path / "megatron"), str(tmp_path / "back")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    to, back = (int(n) for n in result.stdout.split())
    assert max(to, back) < 2 * largest + 96e6 < size / 2
    assert hashes(SafetensorsFolder(tmp_path / "back")) == hashes(SafetensorsFolder(source))
