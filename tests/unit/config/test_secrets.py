"""No secret of a configuration is in what is written or said of it."""

import json

import pytest
import yaml

from megatron_rlsd.checkpoint.settings import check_settings
from megatron_rlsd.config import Config, dump_config, load_config
from megatron_rlsd.config.listing import settings
from megatron_rlsd.config.secrets import MASK, is_secret
from megatron_rlsd.diagnosis.deep import small
from megatron_rlsd.observability.report.run_data import run_data
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.engine import resolved_api_key
from megatron_rlsd.runtime.errors import UserError

KEY = "sk-4711"
VALID = {
    "run_dir": "runs/x",
    "model": {"hf_path": "models/x"},
    "data": {"train": [{"kind": "jsonl", "path": "train.jsonl"}]},
    "reward": {"functions": [{"name": "exact_match"}]},
}
LITERAL = {
    "rollout.sglang.api_key": [f"rollout.sglang.api_key={KEY}"],
    "teacher.sglang.api_key": [f"teacher.sglang={{api_key: {KEY}}}"],
    "rollout.sglang.args": [f"rollout.sglang.args.admin_api_key={KEY}"],
    "rollout.sglang.env": [f"rollout.sglang.env.HF_TOKEN={KEY}"],
    "reward.params": [f"reward.functions.0.params={{judge: {{api_key: {KEY}}}}}"],
    "observability.mlflow.tracking_uri": [
        f"observability.mlflow.tracking_uri=postgresql://me:{KEY}@db/x"
    ],
}


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(VALID))
    return lambda *overrides: load_config(path, list(overrides))


@pytest.mark.parametrize("overrides", LITERAL.values(), ids=LITERAL)
def test_a_literal_key_is_a_mask_in_whatever_is_written(load, tmp_path, overrides):
    config = load("rollout.engine=sglang", *overrides)
    dump_config(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time/step_s": 1.0}\n')
    written = {
        "config.yaml": (tmp_path / "config.yaml").read_text(),
        "state.json and trackers": json.dumps(config.model_dump(mode="json")),
        "report.html": json.dumps(run_data(tmp_path)),
        "a message": f"{config.rollout.sglang.api_key} {config.teacher.sglang!r}",
    }
    assert not [name for name, text in written.items() if KEY in text]
    assert MASK in written["config.yaml"]
    # The run itself has it, and so has what is made from its configuration.
    assert config == Config.model_validate(config.model_dump())
    assert small(config).rollout.sglang == config.rollout.sglang
    with pytest.raises(UserError, match=r"config\.yaml holds only masks in place of secrets: "):
        load_config(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", needs_secrets=False) != config
    if "rollout.sglang" in overrides[0]:
        load_config(tmp_path / "config.yaml", ["rollout.engine=embedded"])


def test_a_reference_stays_as_it_is(load, tmp_path, monkeypatch):
    config = load("rollout.sglang.api_key=env:A_KEY", "teacher.sglang.api_key=env:B_KEY")
    dump_config(config, tmp_path / "config.yaml")
    assert "api_key: env:A_KEY" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config
    monkeypatch.setenv("A_KEY", KEY)
    assert resolved_api_key(config.rollout.sglang.api_key) == KEY
    with pytest.raises(EngineError, match=r"teacher\.sglang\.api_key=env:B_KEY: B_KEY is not set"):
        resolved_api_key(config.teacher.sglang.api_key, "teacher")


@pytest.mark.parametrize("bad", [f"{KEY}\n", f" {KEY}", f"{KEY}é", f"{KEY}\r\nHost: x"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(load, monkeypatch, bad):
    monkeypatch.setenv("A_KEY", bad)
    with pytest.raises(EngineError, match="api_key=env:A_KEY: the key begins or ends") as error:
        resolved_api_key(load("rollout.sglang.api_key=env:A_KEY").rollout.sglang.api_key)
    assert KEY not in str(error.value)


def test_a_resumed_run_compares_no_masks_and_tells_no_key(load):
    masked = load(f"rollout.sglang.api_key={KEY}").model_dump(mode="json")
    reference = load("rollout.sglang.api_key=env:A_KEY").model_dump(mode="json")
    other = load("rollout.sglang.api_key=env:B_KEY").model_dump(mode="json")
    # As release 0.1 saved it.
    literal = load().model_dump(mode="json")
    literal["rollout"]["sglang"]["api_key"] = KEY
    for before in (masked, reference, literal):
        assert check_settings(before, masked, "x") == []
    assert check_settings(literal, reference, "x") == []
    assert check_settings(reference, other, "x") == [
        "rollout.sglang.api_key: 'env:A_KEY' -> 'env:B_KEY'"
    ]


def test_the_report_on_a_run_of_release_0_1_masks_its_key(tmp_path):
    (tmp_path / "config.yaml").write_text(f"rollout: {{sglang: {{api_key: {KEY}, urls: []}}}}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time/step_s": 1.0}\n')
    assert run_data(tmp_path)["settings"]["rollout.sglang.api_key"] == MASK


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"rollout.sglang.api_key=[{KEY}]"], "rollout.sglang.api_key"),
        ([f"rollout.sglang.api_key.x.y={KEY}", "rollout.sglang.api_key=1"], "api_key"),
        ([f'rollout.sglang.api_key="{KEY}'], "not valid YAML"),
        ([f'rollout.sglang.api_key="{KEY}" {KEY}'], "not valid YAML"),
        ([f"rollout.sglang={{api_key: {KEY}, urls: ["], "not valid YAML"),
        # A check of the whole section tells what the section was.
        (
            [f"rollout.sglang={{api_key: {KEY}}}", "rollout.asynchronous.max_staleness=1"],
            "needs engine=sglang",
        ),
        ([f"teacher.sglang={{api_key: {KEY}, ulr: x}}"], "teacher.sglang.ulr: unknown key"),
        ([f"rollout.sglang.urls=['http://me:{KEY}@node7:30000']"], "no user name or password"),
        ([f"teacher.sglang.url=http://me:{KEY}@node7:30000"], "no user name or password"),
    ],
)
def test_messages_about_a_configuration_hold_no_key(load, overrides, named):
    with pytest.raises(UserError) as error:
        load(*overrides)
    assert named in str(error.value)
    assert KEY not in str(error.value)


def test_the_notice_of_keys_left_out_holds_no_key(tmp_path, capsys):
    path = tmp_path / "opd.yaml"
    algorithm = {"name": "opd", "rlsd_lambda": 0.0}
    server = {"url": "http://node7:30000", "api_key": KEY}
    path.write_text(
        yaml.safe_dump({**VALID, "algorithm": algorithm, "teacher": {"sglang": server}})
    )
    load_config(path, ["algorithm.name=rlsd"])
    told = "".join(capsys.readouterr())
    assert "teacher.sglang={'api_key': '**********', 'url': 'http://node7:30000'}" in told
    assert KEY not in told


def test_names_of_secrets_and_others():
    secret = ("api_key", "API-KEY", "OPENAI_API_KEY", "hf_token", "ssl_keyfile_password", "token")
    assert all(map(is_secret, secret))
    plain = ("max_tokens", "end_token", "stop_token_ids", "critique_key", "answer_key", "passes")
    assert not any(map(is_secret, plain))
    # What every setting of ours is called; those of this kind are declared as secrets.
    found = {each.key for each in settings() if is_secret(each.key.rpartition(".")[2])}
    assert found == {
        f"{section}.api_key"
        for section in ("rollout.sglang", "teacher.sglang", "reward.functions.0", "reward.server")
    }
    assert all("shown as a mask" in each.kind for each in settings() if each.key in found)
