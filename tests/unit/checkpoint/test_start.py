"""Where a run starts, and which changes it accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsd.checkpoint.manifest import Manifest, write_manifest
from megatron_rlsd.checkpoint.start import STATE_NAME, choose_start
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.runtime.durable import atomic_folder
from megatron_rlsd.runtime.errors import UserError


def save(config, folder: Path, step: int, *, kind="training", program="train", **hf):
    with atomic_folder(folder) as partial:
        (partial / "hf").mkdir()
        hf_config = load_hf_config(config.model.hf_path) | hf
        (partial / "hf" / "config.json").write_text(json.dumps(hf_config))
        if kind == "training":
            state = {"program": program, "config": config.model_dump(mode="json")}
            (partial / STATE_NAME).write_text(json.dumps(state))
        write_manifest(partial, Manifest(kind, step, {}))
    return folder


def own(config, step):
    return Path(config.run_dir) / "checkpoints" / f"step_{step:08d}"


def start_of(config, program="train"):
    return choose_start(config, load_hf_config(config.model.hf_path), program)


def test_auto_goes_on_at_the_last_checkpoint_and_tells_what_changed(make_config):
    assert start_of(make_config()).folder is None
    before = make_config()
    for step in (2, 4):
        save(before, own(before, step), step)
    changed = make_config(
        train={"steps": 50}, optimizer={"lr": 1e-5}, run_dir=before.run_dir, parallel={"tensor": 2}
    )
    start = start_of(changed)
    assert (start.folder, start.step, start.continues) == (str(own(before, 4)), 4, True)
    told = "\n".join(start.notes)
    for line in ("train.steps: 3 -> 50", "optimizer.lr: 0.001 -> 1e-05", "parallel.tensor: 1 -> 2"):
        assert line in told


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"mode": "ema"}},
        {"model": {"dtype": "bfloat16"}},
        {"train": {"seed": 5}},
        {"algorithm": {"kl_coef": 0.1}},
    ],
)
def test_settings_that_cannot_change_are_named(make_config, change):
    config = make_config()
    save(config, own(config, 2), 2)
    ((section, keys),) = change.items()
    ((key, value),) = keys.items()
    with pytest.raises(UserError, match=rf"{section}\.{key}: .* {value!r} configured"):
        start_of(make_config(**change))


def test_another_model_is_refused_by_the_key_that_differs(make_config):
    config = make_config()
    save(config, own(config, 2), 2, hidden_size=48, transformers_version="0")
    with pytest.raises(UserError, match="hidden_size: 48 in the checkpoint, 32") as error:
        start_of(config)
    assert "transformers_version" not in str(error.value)


def test_never_sets_an_earlier_runs_checkpoints_aside(make_config):
    config = make_config(train={"resume": "never"})
    save(config, own(config, 2), 2)
    assert start_of(config).folder is None
    assert (Path(config.run_dir) / "checkpoints.1" / "step_00000002").is_dir()
    assert start_of(make_config()).folder is None


def test_a_given_checkpoint_is_where_a_run_starts_but_its_own_come_first(make_config, tmp_path):
    other = save(make_config(), tmp_path / "other" / "step_7", 7)
    config = make_config(train={"resume": str(other)})
    start = start_of(config)
    assert (start.folder, start.step, start.continues) == (str(other), 7, False)
    save(config, own(config, 9), 9)  # written since: a requeued job must not begin anew
    assert (start_of(config).step, start_of(config).continues) == (9, True)
    with pytest.raises(UserError, match="does not exist"):
        start_of(make_config(train={"resume": str(tmp_path / "missing")}))


def test_an_earlier_own_checkpoint_rewinds_the_run(make_config):
    config = make_config()
    for step in (2, 4, 6):
        save(config, own(config, step), step)
    rewound = start_of(make_config(train={"resume": str(own(config, 4))}))
    assert (rewound.step, rewound.continues) == (4, True)
    assert start_of(make_config()).step == 4


def test_of_weights_and_of_another_programs_checkpoint_the_weights_are_taken(make_config, tmp_path):
    for name, written in {"w": {"kind": "weights"}, "sft": {"program": "sft"}}.items():
        folder = save(make_config(), tmp_path / name, 30, **written)
        start = start_of(make_config(train={"resume": str(folder)}))
        assert (start.folder, start.kind, start.step) == (str(folder), "weights", 0)
    config = make_config(run_dir=make_config().run_dir + "_sft")
    save(config, own(config, 30), 30, program="sft")
    with pytest.raises(UserError, match="holds checkpoints of sft, not of train"):
        start_of(config)
