"""500 damaged checkpoints: each is refused with a message that names the damage.

What cannot be seen without knowing the weights is not among them: flipped bits in a tensor's
values, two tensors of one shape that changed places, and config values that shape no tensor. File
hashes show those (``inspect --hashes``).
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rlsd.conversion.convert import Sizes, to_megatron
from megatron_rlsd.conversion.describe import check_hashes, hashes
from megatron_rlsd.hf_bridge import SafetensorsFolder, family_for
from megatron_rlsd.runtime.errors import UserError

CASES = 500
INDEX = "model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SHARDS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    family = family_for(CONFIG)
    shapes = family.hf_shapes(family.dims(CONFIG))
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names, weight_map = list(tensors), {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        mine = names[number::SHARDS]
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 30}}}))
    return folder


class Case:
    """A copy of the whole checkpoint, to be damaged in one way."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.shard = rng.choice(sorted(folder.glob("*.safetensors")))

    def tensors(self, change: Callable[[dict[str, Tensor], str], object]) -> str:
        """Rewrite a shard with one tensor changed; that tensor's name."""
        tensors = load_file(self.shard)
        name = self.rng.choice(sorted(tensors))
        change(tensors, name)
        save_file(tensors, self.shard)
        return name

    def json(self, file: str, change: Callable[[Any], object]) -> None:
        content = json.loads((self.folder / file).read_text())
        change(content)
        (self.folder / file).write_text(json.dumps(content))

    def header(self, change: Callable[[dict[str, Any], str], object]) -> str:
        """Rewrite a shard's header with one entry changed; that tensor's name."""
        raw = self.shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        name = self.rng.choice(sorted(header))
        change(header, name)
        encoded = json.dumps(header).encode()
        self.shard.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
        return name


def truncate(case: Case) -> str:
    raw = case.shard.read_bytes()
    case.shard.write_bytes(raw[: case.rng.randrange(len(raw))])
    return case.shard.name


def append(case: Case) -> str:
    with open(case.shard, "ab") as file:
        file.write(bytes(case.rng.randrange(1, 100)))
    return case.shard.name


def flip_in_header(case: Case) -> str:
    raw = bytearray(case.shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    position = case.rng.randrange(8, 8 + length)
    value = raw[position]
    while value == raw[position] or chr(value).isspace():
        value = case.rng.randrange(256)
    raw[position] = value
    case.shard.write_bytes(raw)
    return "model"  # of the shard's or of the tensor's name


def change_header_length(case: Case) -> str:
    raw = bytearray(case.shard.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    while (other := case.rng.choice([case.rng.randrange(2 * length), 2**40, 2**63])) == length:
        pass
    case.shard.write_bytes(other.to_bytes(8, "little") + raw[8:])
    return case.shard.name


def zero_header(case: Case) -> str:
    raw = bytearray(case.shard.read_bytes())
    start = case.rng.randrange(0, 100)
    raw[start : start + 50] = bytes(50)
    case.shard.write_bytes(raw)
    return case.shard.name


def drop_shard(case: Case) -> str:
    case.shard.unlink()
    return case.shard.name


def exchange_shards(case: Case) -> str:
    a, b = case.rng.sample(sorted(case.folder.glob("*.safetensors")), 2)
    a.rename(case.folder / "aside")
    b.rename(a)
    (case.folder / "aside").rename(b)
    return b.name


def rename_tensor(case: Case) -> str:
    return case.tensors(lambda t, name: t.update({name + "_": t.pop(name)}))


def drop_tensor(case: Case) -> str:
    name = case.tensors(lambda t, name: t.pop(name))
    if case.rng.random() < 0.5:
        case.json(INDEX, lambda index: index["weight_map"].pop(name))
    return name


def add_tensor(case: Case) -> str:
    extra = f"model.layers.{case.rng.randrange(9)}.surplus.weight"
    case.tensors(lambda t, name: t.update({extra: torch.ones(3)}))
    if case.rng.random() < 0.5:
        case.json(INDEX, lambda index: index["weight_map"].update({extra: case.shard.name}))
    return extra


def duplicate_tensor(case: Case) -> str:
    a, b = case.rng.sample(sorted(case.folder.glob("*.safetensors")), 2)
    tensors, others = load_file(a), load_file(b)
    name = case.rng.choice(sorted(tensors))
    save_file({**others, name: tensors[name]}, b)
    return name


def exchange_shapes(case: Case) -> str:
    """Two tensors of different shapes change places."""

    def change(tensors: dict[str, Tensor], name: str) -> None:
        other = case.rng.choice([n for n in tensors if tensors[n].shape != tensors[name].shape])
        tensors[name], tensors[other] = tensors[other], tensors[name]

    return case.tensors(change)


def change_shape(case: Case) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        value = tensors[name]
        choices = [value[:-1], torch.cat([value, value[:1]]), value[None], value.flatten()[:-1]]
        if value.ndim == 2 and value.shape[0] != value.shape[1]:
            choices.append(value.T)
        tensors[name] = case.rng.choice(choices).contiguous()

    return case.tensors(change)


def change_dtype(case: Case) -> str:
    dtypes = [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.int64]
    dtype = case.rng.choice(dtypes)
    return case.tensors(lambda t, name: t.update({name: t[name].to(dtype)}))


def lie_about_dtype(case: Case) -> str:
    other = case.rng.choice(["F64", "BF16", "I8", "F31", 7, None])
    return case.header(lambda h, name: h[name].update(dtype=other))


def lie_about_shape(case: Case) -> str:
    def change(header: dict[str, Any], name: str) -> None:
        shape = header[name]["shape"]
        where = case.rng.randrange(len(shape))
        shape[where] = case.rng.choice([shape[where] + 1, 0, -1, 1.5, "x", 2**60])

    return case.header(change)


def lie_about_offsets(case: Case) -> str:
    def change(header: dict[str, Any], name: str) -> None:
        start, stop = header[name]["data_offsets"]
        shift = case.rng.choice([-4, 4, 400])
        wrong = [[start + shift, stop + shift], [stop, start], [start], [start, stop + shift]]
        header[name]["data_offsets"] = case.rng.choice(wrong)

    case.header(change)
    return case.shard.name


def lie_in_index(case: Case) -> str:
    index = json.loads((case.folder / INDEX).read_text())
    name = case.rng.choice(sorted(index["weight_map"]))
    others = sorted({*index["weight_map"].values()} - {index["weight_map"][name]})
    wrong = case.rng.choice([*others, "absent.safetensors", "../elsewhere.safetensors", None, 3])
    if wrong is None:
        case.json(INDEX, lambda i: i["weight_map"].pop(name))
        return name
    case.json(INDEX, lambda i: i["weight_map"].update({name: wrong}))
    return str(wrong)


def break_json(case: Case) -> str:
    file = case.rng.choice([INDEX, "config.json", "tokenizer.json"])
    raw = (case.folder / file).read_text()
    (case.folder / file).write_text(raw[: case.rng.randrange(len(raw))])
    return file


def lie_in_config(case: Case) -> str:
    """Sizes that the tensors contradict, keys that the model would ignore, keys that are gone."""
    key, value, named = case.rng.choice(
        [
            ("vocab_size", 31 + case.rng.choice([-7, -1, 1, 33]), "vocab_size="),
            ("num_hidden_layers", 1, "model.layers.1."),
            ("num_hidden_layers", 3, "model.layers.2."),
            ("num_attention_heads", 8, "q_proj"),
            ("num_attention_heads", 3, "num_attention_heads=3"),
            ("num_key_value_heads", 1, "num_query_groups=1"),
            ("num_key_value_heads", 4, "k_proj"),
            ("hidden_size", 18, "(31, 16), expected (31, 18)"),
            ("intermediate_size", 32, "gate_proj"),
            ("head_dim", 8, "q_norm"),
            ("tie_word_embeddings", True, "lm_head.weight differs"),
            ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel"),
            ("architectures", ["LlamaForCausalLM"], "q_norm"),
            ("hidden_act", "gelu", "hidden_act='gelu'"),
            ("attention_bias", True, "attention_bias=True"),
            ("rope_scaling", {"rope_type": "odd", "factor": 2.0}, "odd"),
            ("logit_scale", 0.5, "logit_scale=0.5"),
            ("vocab_size", None, "vocab_size is missing"),
            ("rms_norm_eps", None, "rms_norm_eps is missing"),
            ("hidden_size", -16, "hidden_size=-16"),
            ("num_hidden_layers", "two", "num_hidden_layers='two'"),
        ]
    )
    case.json("config.json", lambda c: c.update({key: value}))
    return named


def grow_tokenizer(case: Case) -> str:
    largest = 30 + case.rng.randrange(1, 500)
    case.json("tokenizer.json", lambda t: t["model"]["vocab"].update({"c": largest}))
    return f"token id {largest}"


DAMAGES = [
    truncate, append, flip_in_header, change_header_length, zero_header, drop_shard,
    exchange_shards, rename_tensor, drop_tensor, add_tensor, duplicate_tensor, exchange_shapes,
    change_shape, change_dtype, lie_about_dtype, lie_about_shape, lie_about_offsets, lie_in_index,
    break_json, lie_in_config, lie_in_config, lie_in_config, grow_tokenizer,
]  # fmt: skip


def test_every_damage_is_named_and_nothing_is_left_behind(whole: Path, tmp_path: Path) -> None:
    to_megatron(whole, tmp_path / "whole", Sizes(tensor=2))
    shutil.rmtree(tmp_path / "whole")
    failures: list[str] = []
    refused: Counter[str] = Counter()
    for number in range(CASES):
        damage = DAMAGES[number % len(DAMAGES)]
        source = shutil.copytree(whole, tmp_path / "source")
        named = damage(Case(source, random.Random(number)))
        try:
            to_megatron(source, tmp_path / "out", Sizes(tensor=2))
        except UserError as error:
            refused[damage.__name__] += 1
            if named not in str(error):
                failures.append(f"{number} {damage.__name__}: {named!r} is not in: {error}")
        except Exception as error:
            failures.append(f"{number} {damage.__name__} ({named}): raised {error!r}")
        else:
            failures.append(f"{number} {damage.__name__}: {named} was not noticed")
        if {path.name for path in tmp_path.iterdir()} != {"source"}:
            failures.append(f"{number} {damage.__name__}: left output behind")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(source)
    assert not failures, "\n".join(failures)
    assert sum(refused.values()) == CASES


def test_hashes_show_what_headers_cannot(whole: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "hashes.json"
    recorded.write_text(json.dumps(hashes(SafetensorsFolder(whole))))
    source = shutil.copytree(whole, tmp_path / "source")
    assert check_hashes(hashes(SafetensorsFolder(source)), recorded) == []
    shard = sorted(source.glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    to_megatron(source, tmp_path / "out", Sizes())  # a flipped bit is a weight like any other
    problems = check_hashes(hashes(SafetensorsFolder(source)), recorded)
    assert len(problems) == 1
    assert "differs from its hash" in problems[0]
