"""A user's mistake ends the run with one message that names it, whatever the part it is in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_rlsd import train
from megatron_rlsd.run import main


@pytest.fixture
def message_of(make_config, tmp_path, capsys):
    """Run the training program and return the error message that it ended with."""

    def run(**sections) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(make_config(**sections).model_dump(mode="json")))
        assert main(train.train, [str(path)], "usage") == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return run


def test_missing_model_folder(message_of, tmp_path):
    assert str(tmp_path / "nowhere") in message_of(model={"hf_path": str(tmp_path / "nowhere")})


@pytest.fixture
def damaged_model(tiny_model, tmp_path):
    """A copy of the tiny model whose tensors pass through a function first."""

    def damage(change):
        folder = tmp_path / "damaged"
        shutil.copytree(tiny_model, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return {"hf_path": str(folder)}

    return damage


def test_missing_weight(message_of, damaged_model):
    name = "model.layers.2.mlp.up_proj.weight"
    assert name in message_of(model=damaged_model(lambda tensors: tensors.pop(name)))


def test_weight_of_the_wrong_shape(message_of, damaged_model):
    name = "model.layers.1.self_attn.q_norm.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:-1].clone()

    message = message_of(model=damaged_model(cut))
    assert name in message
    assert "15" in message
    assert "16" in message


def test_tokenizer_larger_than_the_embedding(message_of, damaged_model, tmp_path):
    model = damaged_model(lambda tensors: None)
    config_file = Path(model["hf_path"]) / "config.json"
    hf_config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**hf_config, "vocab_size": 100}))
    assert "embeds 100" in message_of(model=model)


def test_impossible_layout(message_of):
    message = message_of(parallel={"pipeline": 3})
    assert "parallel.pipeline=3 does not divide the model's 4 layers; valid: 1, 2, 4" in message
    assert "must divide the number of processes, 1" in message


def test_unreadable_jsonl_line(message_of, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer"\n')
    message = message_of(data={"train": [{"kind": "jsonl", "path": str(data)}], "eval": []})
    assert f"{data}:2" in message


def test_prompts_that_are_all_too_long(message_of):
    message = message_of(prompts={"max_prompt_tokens": 3}, data={"eval": []})
    assert "prompts.max_prompt_tokens=3" in message


def test_prompt_beyond_the_models_positions(message_of):
    message = message_of(rollout={"max_response_tokens": 2000})
    assert "1024" in message


def test_unknown_reward(message_of):
    assert "no_such_reward" in message_of(reward={"functions": [{"name": "no_such_reward"}]})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('broken verifier')", "broken verifier"),
        ("return float('nan')", "nan"),
        ("return 'good'", "good"),
    ],
)
def test_a_reward_that_always_fails_stops_the_run(message_of, tmp_path, body, reason):
    reward = tmp_path / "failing.py"
    reward.write_text(f"def failing(sample):\n    {body}\n")
    message = message_of(reward={"functions": [{"name": f"{reward}:failing"}]})
    assert reason in message
    assert "chain_sum/" in message


def test_a_reward_that_sometimes_fails_costs_its_own_samples(make_config, tmp_path):
    reward = tmp_path / "shaky.py"
    reward.write_text(
        "import time\n"
        "def shaky(sample):\n"
        "    last = sample.response[-1:]\n"
        "    if last in 'aeio0': raise ValueError('shaky')\n"
        "    if last in 'u1': time.sleep(60)\n"
        "    return float(len(sample.response) % 2)\n"
    )
    config = make_config(
        reward={
            "functions": [{"name": f"{reward}:shaky"}],
            "timeout_seconds": 0.5,
            "max_error_share": 1.0,
        },
        train={"steps": 1},
        rollout={"prompts_per_step": 16},
        data={"eval": []},
    )
    train.train(config)
    samples = [
        json.loads(line) for line in (Path(config.run_dir) / "samples/step_000000.jsonl").open()
    ]
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").open()]
    assert 0 < lines[0]["rollout/reward_error_share"] < 1
    for sample in samples:
        failed = sample["response"][-1:] in "aeiou01"
        assert bool(sample["reward_errors"]) == failed
        if failed:
            assert (sample["reward"], sample["advantage"]) == (None, 0)
        else:
            assert sample["reward"] == len(sample["response"]) % 2


def test_a_run_that_learns_nothing_says_so(make_config, tmp_path, capsys):
    config = make_config(
        reward={"functions": [{"name": "exact_match", "params": {"pattern": "#### (-?[0-9]+)"}}]},
        train={"steps": 2},
        data={"eval": []},
        observability={"progress": "plain"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(train.train, [str(path)], "usage") == 0
    shown = capsys.readouterr().out
    assert shown.count("nothing is learned: every response has advantage 0") == 2
    assert "one of them:" in shown
    (told,) = json.loads((Path(config.run_dir) / "status.json").read_text())["warnings"]
    assert "cut at rollout.max_response_tokens=12" in told
