"""What exports and checkpoints say besides weights: what the run used, and nothing that dangles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.data import load_tokenizer
from megatron_rlsd.data.probes import CONVERSATION
from megatron_rlsd.hf_bridge import load_hf_config, save_hf_folder
from megatron_rlsd.run.model_files import ModelFiles, refuse_to_write_over_the_model
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import raw_config
from tests.unit.data.hf_folders import CHATML, byte_level, write_folder


def base_model(folder: Path, **config: Any) -> Path:
    """A model whose tokenizer has no chat template and ends at a token of its own."""
    write_folder(folder, byte_level(), template=None, model_type="qwen3", eos_token="<|endoftext|>")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}')
    (folder / "LICENSE").write_text("free")
    return folder


def configured(model: Path, tmp_path: Path, **tokenizer: Any) -> Config:
    raw = raw_config(model, tmp_path)
    return parse_config({**raw, "tokenizer": tokenizer, "rollout": {"stop_token_ids": [4]}})


def files_of(config: Config) -> ModelFiles:
    hf_config = load_hf_config(config.model.hf_path)
    return ModelFiles(config, hf_config, load_tokenizer(config.tokenizer, config.model.hf_path))


def export(config: Config, out: Path) -> Path:
    files = files_of(config)
    tensors = iter([("a", torch.zeros(1))])
    save_hf_folder(tensors, out, files.hf_config, companions=files.write)
    return out


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_export_is_prompted_as_the_run_was(elsewhere: bool, tmp_path: Path) -> None:
    model = base_model(tmp_path / "model")
    settings: dict[str, Any] = {"chat_template": CHATML.replace("user", "human")}
    if elsewhere:
        other = write_folder(tmp_path / "other", byte_level(), bos_token="<s>", pad_token="</s>")
        settings["path"] = str(other)
    config = configured(model, tmp_path, **settings)
    out = export(config, tmp_path / "out")
    ours = load_tokenizer(config.tokenizer, model)
    again = load_tokenizer(parse_config(raw_config(out, tmp_path)).tokenizer, out)
    theirs = AutoTokenizer.from_pretrained(out)
    prompt = ours.apply_chat_template(list(CONVERSATION))
    assert again.apply_chat_template(list(CONVERSATION)) == prompt
    assert prompt == theirs.apply_chat_template(
        list(CONVERSATION), add_generation_prompt=True, return_dict=False
    )
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    for saved in (generation, load_hf_config(out)):
        assert set(saved["eos_token_id"]) == {*ours.stop_token_ids, 4}
        assert ours.end_of_turn_id in saved["eos_token_id"]
        if elsewhere:
            assert (saved["bos_token_id"], saved["pad_token_id"]) == (3, 4)
    assert (out / "LICENSE").read_text() == "free"


def test_a_checkpoints_folder_says_the_same(tmp_path: Path) -> None:
    config = configured(base_model(tmp_path / "model"), tmp_path, chat_template=CHATML)
    files_of(config).write_with_config(tmp_path / "saved")
    out = export(config, tmp_path / "out")
    for path in out.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    assert load_hf_config(out) == load_hf_config(tmp_path / "saved") | {"dtype": "float32"}


def test_no_reference_to_code_is_left(tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration.Ours", "AutoModelForCausalLM": "modeling.Ours"}
    model = base_model(tmp_path / "model", model_type="deepseek_v3", auto_map=code)
    out = export(configured(model, tmp_path, chat_template=CHATML), tmp_path / "out")
    assert "auto_map" not in load_hf_config(out)
    for trusts in (True, False):
        AutoConfig.from_pretrained(out, trust_remote_code=trusts)
        AutoTokenizer.from_pretrained(out, trust_remote_code=trusts)


def test_what_cannot_go_along_is_said_at_the_start(tmp_path: Path) -> None:
    model = base_model(tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("key")
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match=r"LICENSE is a link out of its folder, to .*/secret"):
        files_of(configured(model, tmp_path, chat_template=CHATML))


def test_a_run_does_not_write_over_the_model_that_it_starts_from(tmp_path: Path) -> None:
    model = base_model(tmp_path / "run" / "hf" / "final")
    config = configured(model, tmp_path, chat_template=CHATML)
    with pytest.raises(UserError, match=r"hf_path=.*final lies in .*choose another run_dir"):
        refuse_to_write_over_the_model(config)
