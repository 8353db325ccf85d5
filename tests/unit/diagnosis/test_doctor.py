"""Each planted fault is found by the check of its name, and only by those that depend on it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.diagnosis import collective, versions
from megatron_rlsd.diagnosis.check import Check, run_check
from megatron_rlsd.diagnosis.collective import check_collectives
from megatron_rlsd.diagnosis.doctor import Doctor
from megatron_rlsd.diagnosis.inputs import check_rewards, first_problems
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import ROOT, raw_config

Raw = dict[str, Any]
Plant = Callable[[Path, Raw], None]
FAULTS: dict[str, tuple[Plant, str, str]] = {}
"""Name -> what plants it into (model folder, configuration), the check that finds it, and words of
its message."""


def fault(check: str, words: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (plant, check, words)
        return plant

    return register


@fault("config", "rollout.temprature: unknown key")
def misspelt_key(model: Path, raw: Raw) -> None:
    raw["rollout"]["temprature"] = 1.0


@fault("model config", "architectures=['MambaForCausalLM']")
def unknown_architecture(model: Path, raw: Raw) -> None:
    change(model / "config.json", architectures=["MambaForCausalLM"])


@fault("model config", "hidden_act")
def unsupported_config_value(model: Path, raw: Raw) -> None:
    change(model / "config.json", hidden_act="gelu")


@fault("weights", "cut short or corrupt")
def truncated_weights(model: Path, raw: Raw) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@fault("weights", "no safetensors file")
def missing_weights(model: Path, raw: Raw) -> None:
    (model / "model.safetensors").unlink()


@fault("weights", "shards that are not in the folder: model-00002-of-00002.safetensors")
def missing_shard(model: Path, raw: Raw) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@fault("weights", "missing: model.layers.4.")
def weights_of_another_config(model: Path, raw: Raw) -> None:
    change(model / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5)


@fault("tokenizer", "320 ids but the model")
def tokenizer_of_another_model(model: Path, raw: Raw) -> None:
    change(model / "config.json", vocab_size=300)


@fault("tokenizer", "drops the user's message")
def deaf_chat_template(model: Path, raw: Raw) -> None:
    raw["tokenizer"] = {"chat_template": "{{ bos_token }}Hello. {% if false %}x{% endif %}"}


@fault("tokenizer", "does not exist")
def missing_tokenizer(model: Path, raw: Raw) -> None:
    raw["tokenizer"] = {"path": str(model / "tokeniser")}


@fault("layout", "parallel.tensor=3 does not divide the model's 4 attention heads")
def impossible_layout(model: Path, raw: Raw) -> None:
    raw["parallel"] = {"tensor": 3}


@fault("run_dir", "is not a folder")
def run_dir_under_a_file(model: Path, raw: Raw) -> None:
    raw["run_dir"] = str(model / "config.json" / "run")


@fault("run_dir", "GiB wanted for checkpoints")
def more_exports_than_the_disk_holds(model: Path, raw: Raw) -> None:
    raw["train"] |= {"steps": 10**12}
    raw["checkpoint"] = {"hf_export_interval": 1}


@fault("data", "does not exist")
def missing_data(model: Path, raw: Raw) -> None:
    raw["data"]["train"] = [{"kind": "jsonl", "path": str(model / "problems.jsonl")}]


@fault("data", "problems.jsonl:2: missing field 'answer'")
def malformed_data(model: Path, raw: Raw) -> None:
    file = model / "problems.jsonl"
    file.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?"}\n')
    raw["data"]["train"] = [{"kind": "jsonl", "path": str(file)}]


@fault("rewards", "unknown reward 'exact_mach'")
def misspelt_reward(model: Path, raw: Raw) -> None:
    raw["reward"]["functions"] = [{"name": "exact_mach"}]


@fault("rewards", "no_such_module")
def reward_that_cannot_be_imported(model: Path, raw: Raw) -> None:
    (model / "mine.py").write_text("import no_such_module\ndef mine(sample):\n    return 1.0\n")
    raw["reward"]["functions"] = [{"name": f"{model / 'mine.py'}:mine"}]


@fault("environment", "has no metadata['guessing_game']")
def environment_for_other_problems(model: Path, raw: Raw) -> None:
    raw["environment"] = {"name": "guessing_game", "workers": 1}


@fault("sglang environment", "does not exist")
def missing_sglang(model: Path, raw: Raw) -> None:
    raw["rollout"] |= {"engine": "sglang", "sglang": {"python": str(model / "python")}}
    raw["distributed"] = {"timeout_seconds": 3600}


@fault("sglang environment", "has no package sglang")
def environment_without_sglang(model: Path, raw: Raw) -> None:
    raw["rollout"] |= {"engine": "sglang", "sglang": {"python": sys.executable}}
    raw["distributed"] = {"timeout_seconds": 3600}


@fault("sglang environment", "has no package torch_memory_saver")
def environment_that_gives_no_memory_back(model: Path, raw: Raw) -> None:
    packages, python = model / "packages", model / "python"
    (packages / "sglang").mkdir(parents=True)
    (packages / "sglang-0.5.23.dist-info").mkdir()
    (packages / "sglang-0.5.23.dist-info/METADATA").write_text("Name: sglang\nVersion: 0.5.23\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    servers = {"python": str(python), "device": "cuda"}
    raw["rollout"] |= {"engine": "sglang", "colocated": True, "sglang": servers}
    raw["distributed"] = {"timeout_seconds": 3600}


@fault("servers", "http://127.0.0.1:")
def server_that_is_down(model: Path, raw: Raw) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    raw["rollout"] |= {"engine": "sglang", "sglang": {"urls": [f"http://127.0.0.1:{port}"]}}
    raw["distributed"] = {"timeout_seconds": 3600}


DEPENDENT = {
    "unknown_architecture": {"weights"},
    "unsupported_config_value": {"weights"},
    "tokenizer_of_another_model": {"weights"},
    "missing_tokenizer": set(),
}
"""Other checks that rightly fail too."""


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def healthy(tiny_model: Path, tmp_path: Path) -> tuple[Path, Raw]:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    raw = raw_config(model, tmp_path)
    raw["reward"]["functions"] = [{"name": "exact_match", "params": {"pattern": "#### (-?[0-9]+)"}}]
    return model, raw


def examine(raw: Raw, folder: Path) -> dict[str, Check]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return {check.name: check for check in Doctor(path).checks(machine_too=False)}


def failed(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.message for name, check in checks.items() if check.status == "failed"}


REWARDS = {
    "return 1.0": ("warning", "answer 1, wrong 1, empty 1"),
    "return float(sample.response == 'nobody says this')": ("warning", "answer 0, wrong 0, empty"),
    "return -float(sample.response == sample.problem.answer)": ("warning", "tells no answer"),
    "return 1.0 / len(sample.response)": ("warning", "fails on a wrong or an empty answer"),
    "raise KeyError('gold')": ("failed", "KeyError: 'gold'"),
    "return float(sample.problem.answer in sample.response)": ("ok", "answer 1, wrong 0, empty 0"),
}
"""Body of a reward -> what the check makes of it."""


def rewards_of(config: Config) -> str:
    return check_rewards(config, first_problems(config))


@pytest.mark.process
def test_rewards_are_tried_on_an_answer_a_wrong_and_an_empty_one(
    healthy: tuple[Path, Raw], tmp_path: Path
) -> None:
    for number, (body, (status, words)) in enumerate(REWARDS.items()):
        reward = tmp_path / f"reward_{number}.py"
        reward.write_text(f"def judge(sample):\n    {body}\n")
        raw = healthy[1] | {"reward": {"functions": [{"name": f"{reward}:judge"}]}}
        config = parse_config(raw)
        check = run_check("rewards", partial(rewards_of, config))
        assert check.status == status, check
        assert words in check.message


@pytest.mark.process
def test_a_healthy_configuration_passes(healthy: tuple[Path, Raw], tmp_path: Path) -> None:
    checks = examine(healthy[1], tmp_path)
    assert failed(checks) == {}
    assert {name for name, check in checks.items() if check.status == "ok"} == {
        "config",
        "megatron-core",
        "model config",
        "weights",
        "tokenizer",
        "layout",
        "processes",
        "run_dir",
        "data",
        "rewards",
        "hidden text",
    }


@pytest.mark.process
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_found_by_name(
    name: str, healthy: tuple[Path, Raw], tmp_path: Path
) -> None:
    plant, check, words = FAULTS[name]
    plant(*healthy)
    found = failed(examine(healthy[1], tmp_path))
    assert words in found[check]
    assert found.keys() <= {check} | DEPENDENT.get(name, set())


def test_versions_outside_the_matrix_fail_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.MATRIX, "torch", versions.Range((99,)))
    found = {check.name: check for check in versions.version_checks()}
    assert found["version of torch"].status == "failed"
    assert "expected >= 99" in found["version of torch"].message
    assert [c.name for c in found.values() if c.status == "failed"] == ["version of torch"]


@pytest.mark.process
def test_ranks_that_never_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "_RANK", "import time; time.sleep(60)")
    monkeypatch.setattr(collective, "SECONDS", 1.0)
    with pytest.raises(UserError, match=r"ranks \[0, 1\] did not finish"):
        check_collectives()


@pytest.mark.process
def test_a_wrong_sum_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import json,sys; json.dump(dict(good=sys.argv[1]=='0', seconds=0), open(sys.argv[5]"
    monkeypatch.setattr(collective, "_RANK", code + "+'/'+sys.argv[1],'w'))")
    with pytest.raises(UserError, match=r"ranks \[1\] got a wrong sum"):
        check_collectives()


def run_tool(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = list(map(str, [sys.executable, ROOT / "tools/doctor.py", *words]))
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=240
    )


@pytest.mark.process
def test_a_megatron_that_is_too_old_is_found_though_nothing_can_be_imported(
    tmp_path: Path,
) -> None:
    info = tmp_path / "megatron_core-0.15.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    done = run_tool("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["failed"] == ["version of megatron-core", "program"]
    messages = {check["name"]: check["message"] for check in report["checks"]}
    assert "0.15.0 is not supported; expected >= 0.16.1" in messages["version of megatron-core"]


@pytest.mark.process
def test_the_tool_compares_engine_and_trainer(healthy: tuple[Path, Raw], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(healthy[1]))
    done = run_tool(path, "--deep", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["collectives"]["status"] == "ok"
    assert checks["engine against trainer"]["status"] == "ok"
    assert "sampled tokens differ by" in checks["engine against trainer"]["message"]


@pytest.mark.process
def test_the_tool_prints_a_table_and_fails(healthy: tuple[Path, Raw], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(healthy[1]))
    done = run_tool(path, "parallel.tensor=3")
    assert done.returncode == 1
    assert "FAILED   layout" in done.stdout
    assert done.stdout.endswith("1 failed: layout\n")
