"""The converter as a user runs it: its files, its words and its exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_rlsd.actor.model import build_model, transformer_config
from megatron_rlsd.checkpoint.manifest import read_manifest
from megatron_rlsd.checkpoint.sharding import model_pieces, model_tensors
from megatron_rlsd.checkpoint.storage import load_into
from megatron_rlsd.commands import convert
from megatron_rlsd.commands.conversions import log_prob_difference
from megatron_rlsd.config import ModelConfig, ParallelConfig
from megatron_rlsd.conversion.compare import open_checkpoint, tensor_hash
from megatron_rlsd.hf_bridge import SafetensorsFolder, family_for, load_hf_config
from megatron_rlsd.parallel.groups import parallel_world
from tests.models import save_random_model
from tests.unit.data.hf_folders import byte_level, write_folder

ROOT = Path(__file__).parents[3]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return convert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a vocabulary of 67."""
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return save_random_model(config, tmp_path_factory.mktemp("model"), seed=3)


def hashes(folder: Path) -> dict[str, str]:
    reader = SafetensorsFolder(folder)
    return {name: tensor_hash(reader.slice(name)) for name in reader.tensors}


def run(tool: ModuleType, *args: Any) -> int:
    return tool.main([str(arg) for arg in args])


def test_there_and_back_and_verified(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    sizes = ("--tensor-parallel", 2, "--pipeline-parallel", 3)
    assert run(tool, "to-megatron", model, megatron, *sizes) == 0
    manifest = read_manifest(megatron)
    assert (manifest.kind, manifest.step) == ("weights", 0)
    assert manifest.layout == {"tensor": 2, "pipeline": 3, "expert": 1, "expert_tensor": 2}
    assert run(tool, "to-hf", megatron, back, "--max-shard-size", "20KB") == 0
    assert hashes(back) == hashes(model)
    assert len(list(back.glob("*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(back)
    capsys.readouterr()
    for a, b in ((model, megatron), (megatron, back), (model, back)):
        assert run(tool, "verify", a, b, "--skip-log-probs") == 0
        assert "30 tensors bit-identical" in capsys.readouterr().out
    assert run(tool, "inspect", megatron) == 0
    shown = capsys.readouterr().out
    for fact in ("family: llama", "layers: 3", "tensor 2, pipeline 3", "F32 x 30", "are whole"):
        assert fact in shown


def test_the_trainer_resumes_from_a_converted_checkpoint(
    tool: ModuleType, model: Path, tmp_path: Path
) -> None:
    """Through the checkpoint package's own loading, not the bridge's."""
    assert run(tool, "to-megatron", model, tmp_path / "megatron", "--tensor-parallel", 2) == 0
    hf_config = load_hf_config(model)
    family, parallel = family_for(hf_config), ParallelConfig()
    config = transformer_config(
        ModelConfig(hf_path=str(model), dtype="float32"), parallel, family, hf_config
    )
    shape = family.dims(hf_config)
    with parallel_world(parallel, shape, timeout_seconds=60, seed=1) as groups:
        chunks = build_model(config, family, hf_config, groups)
        for parameter in chunks[0].parameters():
            parameter.data.fill_(0.5)
        load_into(model_tensors(model_pieces(chunks, groups)), tmp_path / "megatron")
        stored = load_file(model / "model.safetensors")
        own = dict(chunks[0].named_parameters())
        assert torch.equal(own["output_layer.weight"], stored["lm_head.weight"])
        gate_up = own["decoder.layers.2.mlp.linear_fc1.weight"]
        assert torch.equal(gate_up[:40], stored["model.layers.2.mlp.gate_proj.weight"])
        assert torch.equal(gate_up[40:], stored["model.layers.2.mlp.up_proj.weight"])


def test_verify_names_the_tensor_that_differs(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 4] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert run(tool, "to-megatron", other, tmp_path / "megatron") == 0
    for b in (other, tmp_path / "megatron"):
        assert run(tool, "verify", model, b, "--skip-log-probs") == 1
        assert f"differs: {name}: max abs difference 0.25" in capsys.readouterr().out
    assert run(tool, "verify", model, other, "--tolerance", 0.3, "--skip-log-probs") == 0
    tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert run(tool, "verify", model, other, "--tolerance", 9, "--skip-log-probs") == 1
    shown = capsys.readouterr().out
    assert "differs: model.norm.weight: only in" in shown
    assert "differs: lm_head.weight: shape (67, 32)" in shown
    assert run(tool, "inspect", other) == 1
    assert "missing: model.norm.weight" in capsys.readouterr().out


def test_no_number_is_never_equal_to_a_number(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert run(tool, "verify", model, other, "--tolerance", 9, "--skip-log-probs") == 1
    assert "model.norm.weight: max abs difference nan" in capsys.readouterr().out


def test_cast_checkpoint_is_equal_within_a_tolerance(
    tool: ModuleType, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "megatron"
    assert run(tool, "to-megatron", model, out, "--dtype", "bfloat16") == 0
    assert run(tool, "verify", model, out, "--skip-log-probs") == 1
    assert run(tool, "verify", model, out, "--skip-log-probs", "--tolerance", 1e-3) == 0


def test_inspect_writes_and_checks_hashes(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "hashes.json"
    assert run(tool, "to-megatron", model, tmp_path / "megatron") == 0
    assert run(tool, "inspect", model, "--write-hashes", recorded) == 0
    assert json.loads(recorded.read_text()) == hashes(model)
    assert run(tool, "inspect", tmp_path / "megatron", "--hashes", recorded) == 0
    assert "hashes are whole" in capsys.readouterr().out
    other = shutil.copytree(model, tmp_path / "other")
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    assert run(tool, "inspect", other) == 0
    assert run(tool, "inspect", other, "--hashes", recorded) == 1
    assert "differs from its hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("to-megatron", "absent", "out"), "absent is not a folder"),
        (("to-megatron", "MODEL", "out", "--tensor-parallel", "4"), "num_query_groups=2"),
        (("to-hf", "MODEL", "out"), "config.json is missing: it says which model"),
        (("verify", "MODEL", "absent"), "absent is not a folder"),
        (("inspect", "absent"), "absent is not a folder"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tool: ModuleType,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tool, *(model if arg == "MODEL" else arg for arg in args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("to-megatron", "a", "b", "--tensor-parallel", "0"), "at least 1"),
        (("to-megatron", "a", "b", "--dtype", "int8"), "float32"),
        (("to-hf", "a", "b", "--max-shard-size", "big"), "expected for example 5GB"),
        (("explode",), "invalid choice"),
    ],
)
def test_bad_options(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tool, *args)
    assert message in capsys.readouterr().err


def test_damaged_checkpoint_is_refused_by_its_manifest(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, "to-megatron", model, tmp_path / "megatron") == 0
    (tmp_path / "megatron" / "common.pt").unlink()
    assert run(tool, "to-hf", tmp_path / "megatron", tmp_path / "back") == 2
    assert "common.pt is missing" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.skipif(
    not (SMOLLM2 / "config.json").is_file(), reason="models/SmolLM2-135M-Instruct is absent"
)
def test_smollm2_there_and_back_on_real_text(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    sizes = ("--tensor-parallel", 3, "--pipeline-parallel", 4)
    assert run(tool, "to-megatron", SMOLLM2, megatron, *sizes) == 0
    assert run(tool, "to-hf", megatron, back, "--max-shard-size", "100MB") == 0
    assert hashes(back) == hashes(SMOLLM2)
    assert (back / "chat_template.jinja").read_text() == (
        SMOLLM2 / "chat_template.jinja"
    ).read_text()
    shutil.rmtree(megatron / "hf")
    shutil.copytree(back, megatron / "hf", ignore=shutil.ignore_patterns("*.safetensors*"))
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text("Water boils at 100 degrees Celsius at sea level, and lower in the mountains.")
    assert run(tool, "verify", back, megatron, "--text", text) == 0
    shown = capsys.readouterr().out
    assert "272 tensors bit-identical" in shown
    assert "log-probabilities: transformers and Megatron differ by at most" in shown

    # The comparison would prove nothing if it could not fail.
    weights = open_checkpoint(back)
    bent = SimpleNamespace(
        path=weights.path,
        tensors=weights.tensors,
        slice=lambda name, ranges=(), out=None: (
            weights.slice(name, ranges, out) * (1.01 if name == "model.norm.weight" else 1)
        ),
    )
    difference, tokens = log_prob_difference(back, bent, text.read_text(), 64)
    assert difference > 0.01
    assert tokens > 10


@pytest.mark.parametrize("folder", ["run", "run/checkpoints"])
def test_a_runs_folder_in_place_of_a_checkpoint_is_told(
    folder: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 10):
        checkpoint = tmp_path / f"run/checkpoints/step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / ".metadata").touch()
    assert run(tool, "to-hf", tmp_path / folder, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "is not a checkpoint but holds 2 of them; the newest is" in told
    assert "run/checkpoints/step_00000010" in told


def test_verify_compares_what_tokenizers_make_of_text(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {}
    for name, rules in (("a", r"\p{N}+|\P{N}+"), ("b", r"\p{N}|\P{N}+"), ("c", r"\p{N}+|\P{N}+")):
        shutil.copytree(model, tmp_path / name)
        write_folder(tmp_path / f"{name}_tokenizer", byte_level(rules), tokenizer_class="Any")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tmp_path / f"{name}_tokenizer" / file, tmp_path / name / file)
        made[name] = tmp_path / name
    assert run(tool, "verify", made["a"], made["c"], "--skip-log-probs") == 0
    assert "tokenizers: the same ids of 7 texts" in capsys.readouterr().out
    assert run(tool, "verify", made["a"], made["b"], "--skip-log-probs") == 1
    assert "tokenizers: of '0123456789 " in capsys.readouterr().out
