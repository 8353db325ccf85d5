"""Folders that transformers loads; complete or not there at all; and content hashes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.hf_bridge import SafetensorsFolder, save_hf_folder
from megatron_rlsd.runtime.errors import UserError


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    reader = SafetensorsFolder(folder)
    return ((name, reader.slice(name)) for name in reader.tensors)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 40_000, 1])
def test_transformers_reads_the_same_model(
    tiny_folders: dict[str, Path], tmp_path: Path, max_shard_bytes: int
) -> None:
    source = tiny_folders["llama_untied_gqa"]
    save_hf_folder(tensors_of(source), tmp_path / "out", source, max_shard_bytes=max_shard_bytes)
    written = dict(tensors_of(tmp_path / "out"))
    expected = dict(tensors_of(source))
    assert {n: tensor_hash(t) for n, t in written.items()} == {
        n: tensor_hash(t) for n, t in expected.items()
    }
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", source))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_stay_within_the_limit(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    limit = 40_000
    source = tiny_folders["qwen3_untied_mqa"]
    save_hf_folder(tensors_of(source), tmp_path / "out", source, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        nbytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values())
        assert nbytes <= limit
        total += nbytes
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_cast_is_written_into_the_config(
    tiny_folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    source = tiny_folders["qwen3_tied_gqa"]
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    save_hf_folder(
        tensors_of(source), tmp_path / "out", {**config, key: "float32"}, dtype=torch.bfloat16
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, key: "bfloat16"}
    expected = {name: tensor_hash(t.bfloat16()) for name, t in tensors_of(source)}
    assert {name: tensor_hash(t) for name, t in tensors_of(tmp_path / "out")} == expected


def test_tokenizer_and_generation_files_go_along(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_hf_folder(tensors_of(tiny_folders["llama_tied_mqa"]), source, {"vocab_size": 157})
    companions = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "generation_config.json", "chat_template.jinja", "merges.txt", "LICENSE",
    ]  # fmt: skip
    for name in [*companions, "optimizer.pt", "pytorch_model.bin"]:
        (source / name).write_text(f"content of {name}")
    (source / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    save_hf_folder(tensors_of(source), tmp_path / "out", source)
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert out == {
        *companions, "additional_chat_templates", "config.json", "model.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out" / "LICENSE").read_text() == "content of LICENSE"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "tool"


def test_code_goes_along_only_with_a_tokenizer_that_is_nothing_else(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, code = tmp_path / "source", {"AutoModelForCausalLM": "modeling.Model"}
    save_hf_folder(tensors_of(tiny_folders["llama_tied_mqa"]), source, {"vocab_size": 157})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization.Ours", None]}, "eos_token": "a"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenization.py").write_text("from .words import WORDS\n")
    for name in ("words.py", "modeling.py", "private.py"):
        (source / name).write_text("WORDS = []\n")
    save_hf_folder(tensors_of(source), tmp_path / "out", source)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {
        "tokenization.py",
        "words.py",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings
    (source / "tokenizer.json").write_text("{}")
    save_hf_folder(tensors_of(source), tmp_path / "whole", source)
    assert not list((tmp_path / "whole").glob("*.py"))
    assert json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text()) == {
        "eos_token": "a"
    }


def test_what_leads_out_of_the_folder_is_refused_before_anything_is_written(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_hf_folder(tensors_of(tiny_folders["llama_tied_mqa"]), source, {"vocab_size": 157})
    (tmp_path / "secret").write_text("key")
    for name in ("LICENSE", "tokenizer.json", "additional_chat_templates/x.jinja"):
        link = source / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="is a link out of its folder"):
            save_hf_folder(tensors_of(source), tmp_path / "out", source)
        link.unlink()
        os.mkfifo(link)
        with pytest.raises(UserError, match="is not a regular file"):
            save_hf_folder(tensors_of(source), tmp_path / "out", source)
        link.unlink()
        assert not (tmp_path / "out").exists()


def test_failure_half_way_keeps_the_old_folder(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, out = tiny_folders["llama_tied_mqa"], tmp_path / "out"
    save_hf_folder(tensors_of(source), out, source)
    before = content(out)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors_of(source))[:5]
        raise ConnectionError("a rank died")

    with pytest.raises(ConnectionError):
        save_hf_folder(failing(), out, source, max_shard_bytes=1)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftover_of_a_killed_writer_is_no_obstacle(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    source, out = tiny_folders["llama_tied_mqa"], tmp_path / "out"
    for leftover in (".out.partial", ".out.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "junk.safetensors").write_text("junk")
    save_hf_folder(tensors_of(source), out, source)
    save_hf_folder(((n, t + 1) for n, t in tensors_of(source)), out, source)
    assert torch.equal(
        dict(tensors_of(out))["model.norm.weight"],
        dict(tensors_of(source))["model.norm.weight"] + 1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folders_that_are_left_alone(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_folders["llama_tied_mqa"]
    before = content(source)
    with pytest.raises(UserError, match="is the source folder"):
        save_hf_folder(tensors_of(source), source, source)
    assert content(source) == before
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no config\.json; it is left alone"):
        save_hf_folder(tensors_of(source), tmp_path, source)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_other_ranks_run_the_iterator_to_its_end_and_write_nothing(tmp_path: Path) -> None:
    seen = []

    def collective() -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b"):
            seen.append(name)
            yield name, torch.ones(1)

    save_hf_folder(collective(), tmp_path / "out", {}, is_writer=False)
    assert seen == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pairs", "message"), [([], "no tensors"), ([("a", torch.ones(1))] * 2, "a was to be written")]
)
def test_nothing_or_a_name_twice_is_refused(pairs: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        save_hf_folder(iter(pairs), tmp_path / "out", {}, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_hash_depends_on_values_shape_and_dtype_alone() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    transposed_twice = tensor.T.contiguous().T
    assert transposed_twice.stride() != tensor.stride()
    assert tensor_hash(transposed_twice) == tensor_hash(tensor.requires_grad_())
    plain = tensor.detach()
    others = [
        plain.view(4, 3),
        plain.view(torch.int32),
        plain.bfloat16(),
        -plain,  # differs from 0 in the sign bit of its first element too
        plain + torch.eye(3, 4) * 1e-7,
        torch.tensor(0.0),
        torch.tensor([0.0]),
        torch.tensor([]),
    ]
    assert len({tensor_hash(t) for t in (plain, *others)}) == 1 + len(others)
