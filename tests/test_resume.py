"""A run that was interrupted, however rudely, goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_rlsd import rollout_only, sft, train
from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.checkpoint.manifest import read_manifest, whole_checkpoints
from megatron_rlsd.commands.replay import main as replay_command
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.recovery.replay import replay
from megatron_rlsd.run import assemble
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import Preempted
from megatron_rlsd.runtime.ownership import OWNER_NAME

STEPS = 8
INTERRUPTING = '''
import json
import os
from pathlib import Path

def trainer():
    """The process that owns the run's folder."""
    return json.loads(Path({owner!r}).read_text())["pid"]

def interrupting(sample):
    """Even digits; once, when step {step} is scored, {what}."""
    done = Path({metrics!r})
    lines = done.read_text().count("train/loss") if done.exists() else 0
    flag = Path({flag!r})
    if lines == {step} and not flag.exists():
        flag.touch()
        {action}
    digits = [c for c in sample.response if c.isdigit()]
    return sum(c in "02468" for c in digits) / max(1, len(digits))
'''


def interrupting_reward(folder: Path, run_dir: str, step: int, action: str) -> Path:
    path = folder / "interrupting.py"
    path.write_text(
        INTERRUPTING.format(
            step=step,
            what=action,
            metrics=f"{run_dir}/metrics.jsonl",
            owner=f"{run_dir}/{OWNER_NAME}",
            flag=str(folder / "interrupted"),
            action=action,
        )
    )
    return path


def lines_of(config: Config) -> list[dict[str, Any]]:
    """metrics.jsonl without timings."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time", "perf/", "memory/"))}
        for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")
    ]


@pytest.fixture
def pair(make_config, tmp_path) -> Callable[..., tuple[Config, Config]]:
    """Two configurations alike, but that the second is interrupted in step 4."""

    def make(action: str, step: int = 4, **sections: dict[str, Any]) -> tuple[Config, Config]:
        run_dir = str(tmp_path / "interrupted_run")
        reward = interrupting_reward(tmp_path, run_dir, step, action)
        sections["train"] = {"steps": STEPS, **sections.get("train", {})}
        sections["eval"] = {"interval": 3, "num_problems": 2, "n_samples": 1, "pass_at_k": [1]}
        sections["reward"] = {
            "functions": [{"name": f"{reward}:interrupting"}],
            "on_error": "stop",
        }
        sections["checkpoint"] = {"interval": 2, **sections.get("checkpoint", {})}
        plain = make_config(
            **sections | {"run_dir": str(tmp_path / "plain"), "checkpoint": {"interval": 0}}
        )
        return plain, make_config(**sections | {"run_dir": run_dir})

    return make


def questions(count: int) -> dict[str, Any]:
    """Data of so few that epochs end within the run; every step takes three."""
    return {"train": [{"kind": "reasoning_gym", "task": "chain_sum", "size": count, "seed": 1}]}


@pytest.mark.parametrize(
    "sections",
    [
        {
            "teacher": {"mode": "frozen"},
            "algorithm": {"kl_coef": 0.05},
            # An epoch ends with step 3: the last checkpoint is between two.
            "data": questions(12),
        },
        {
            "teacher": {"mode": "periodic", "interval": 3},
            "optimizer": {"lr_warmup_steps": 6},
            # Epochs end within steps, one of them in the step that is interrupted.
            "data": questions(7),
        },
        {"teacher": {"mode": "ema"}, "train": {"global_batch_size": 6, "epochs_per_rollout": 2}},
        {
            "teacher": {"mode": "ema", "ema_decay": 0.9},
            "model": {"dtype": "bfloat16"},
            "optimizer": {"distributed": True},
            "checkpoint": {"async_save": False},
            "algorithm": {"lambda_decay_steps": 5},
        },
    ],
    ids=["frozen_kl", "periodic", "ema_updates", "ema_bfloat16_distributed"],
)
def test_resumed_metrics_are_those_of_an_uninterrupted_run(pair, sections, tmp_path):
    plain, interrupted = pair("raise RuntimeError('interrupted')", **sections)
    with pytest.raises(UserError, match="interrupted"):
        train.train(interrupted)
    assert [line["step"] for line in lines_of(interrupted)] == [0, 0, 1, 2, 3, 3]
    train.train(interrupted)
    (tmp_path / "interrupted").touch()
    train.train(plain)
    assert len(lines_of(plain)) == STEPS + 4
    assert lines_of(interrupted) == lines_of(plain)
    kept = [manifest.step for _, manifest in whole_checkpoints(run_path(interrupted))]
    assert kept == [6, 8]
    # A third start finds nothing left to do.
    train.train(interrupted)
    assert lines_of(interrupted) == lines_of(plain)


def run_path(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def start_program(config: Config, folder: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The training program in a process of its own, with ``code`` executed first."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    program = f"{code}\nimport sys\nfrom megatron_rlsd import run, train\n"
    program += f"sys.exit(run.main(train.train, [{str(path)!r}], ''))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


KILLED_IN_A_SAVE = """
import os, signal
from megatron_rlsd.checkpoint import {imported}
original = {module}.{name}
calls = []
def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
{module}.{name} = killed
"""


def test_kill_9_in_a_step_and_in_saves(pair, tmp_path):
    """Killed in a step, while shards are written, before the manifest, and before the rename."""
    plain, interrupted = pair("os.kill(trainer(), 9)", checkpoint={"async_save": False})
    ended = start_program(interrupted, tmp_path)
    assert ended.returncode == -signal.SIGKILL
    for module, name, call, last in [
        ("storage", "_on_cpu", 1, 4),
        ("checkpointer.manifests", "write_manifest", 1, 4),
        ("checkpointer", "put_in_place", 2, 6),
    ]:
        fault = KILLED_IN_A_SAVE.format(
            module=module, imported=module.split(".")[0], name=name, call=call
        )
        ended = start_program(interrupted, tmp_path, fault)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
        whole = [manifest.step for _, manifest in whole_checkpoints(run_path(interrupted))]
        assert whole[-1] == last, name
        assert any(path.name.startswith(".") for path in run_path(interrupted).iterdir())
    ended = start_program(interrupted, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "resuming at step" in ended.stdout
    train.train(plain)
    assert lines_of(interrupted) == lines_of(plain)
    assert not [path for path in run_path(interrupted).iterdir() if path.name.startswith(".")]


def test_a_signal_saves_and_ends_with_its_own_exit_code(pair, tmp_path):
    plain, interrupted = pair("os.kill(trainer(), 15)", checkpoint={"interval": 0})
    ended = start_program(interrupted, tmp_path)
    assert ended.returncode == 75, ended.stderr
    assert "SIGTERM: stopped after step 5, all saved" in ended.stderr
    status = json.loads((Path(interrupted.run_dir) / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("preempted", 75)
    ended = start_program(interrupted, tmp_path)
    assert ended.returncode == 0, ended.stderr
    train.train(plain)
    assert lines_of(interrupted) == lines_of(plain)
    status = json.loads((Path(interrupted.run_dir) / "status.json").read_text())
    assert status["status"] == "finished"


def test_a_signal_in_this_process_is_handled_only_while_it_trains(pair, tmp_path):
    _, interrupted = pair("import signal; os.kill(trainer(), signal.SIGUSR1)")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Preempted, match="SIGUSR1"):
        train.train(interrupted)
    assert signal.getsignal(signal.SIGUSR1) is before


def poison(monkeypatch, steps: dict[int, list[float]]) -> None:
    """Put a value into one gradient of update number n, as a broken kernel or overflow would."""
    run = Actor._run
    updates: list[int] = []

    def poisoned(self, *args, forward_only: bool, **kwargs):
        results = run(self, *args, forward_only=forward_only, **kwargs)
        if not forward_only:
            updates.append(1)
            values = steps.get(len(updates) - 1, [])
            gradient = next(iter(self.parameters().values())).main_grad
            gradient.view(-1)[: len(values)] = torch.tensor(values)
        return results

    monkeypatch.setattr(Actor, "_run", poisoned)


@pytest.mark.parametrize(
    ("distributed", "first", "second"),
    [(False, [math.nan], [1e30]), (True, [1.5e19, -1.5e19], [math.inf])],
)
def test_a_step_with_a_gradient_or_norm_that_is_not_finite_changes_nothing_and_is_kept(
    make_config, monkeypatch, distributed, first, second, tmp_path
):
    """The steps around two bad ones are those of a run that only skips these updates.

    A norm overflows float32 from 1.8e19 on, long before a single gradient does.
    """
    config = make_config(
        train={"steps": 4, "record_steps": [2]},
        optimizer={"distributed": distributed, "weight_decay": 0.1},
        checkpoint={"interval": 1, "keep": None},
        teacher={"mode": "ema"},
    )
    poison(monkeypatch, {1: first, 3: second})
    train.train(config)
    lines = [line for line in lines_of(config) if "train/loss" in line]
    assert [line["train/updates_skipped"] for line in lines] == [0, 1, 0, 1]
    assert [line["train/grad_norm"] is None for line in lines] == [False, True, False, True]
    assert all(line["train/loss"] is not None for line in lines)
    recorded = {path.name for path in Path(config.run_dir).glob("*_steps/*.safetensors")}
    assert recorded == {f"step_0000000{step}.safetensors" for step in (1, 2, 3)}
    weights = [exported(config, step, tmp_path) for step in (1, 2, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert all(w.isfinite().all() for w in weights)


def exported(config: Config, step: int, tmp_path: Path) -> torch.Tensor:
    """All weights after a step, through a rollout-only start from its checkpoint."""
    resume = str(run_path(config) / f"step_{step:08d}")
    changed = config.model_copy(
        update={
            "run_dir": str(tmp_path / f"export_{step}"),
            "train": config.train.model_copy(update={"resume": resume}),
        }
    )
    with assemble(changed, total_updates=None, total_steps=0, program="rollout_only") as run:
        run.continuity.load_weights(run.actor)
        return torch.cat([tensor.flatten().clone() for _, tensor in run.actor.hf_tensors()])


def test_bad_steps_in_a_row_stop_the_run_with_the_culprit_on_disk(make_config, monkeypatch, capsys):
    config = make_config(train={"steps": 6, "max_bad_steps": 2})
    poison(monkeypatch, {1: [math.nan], 3: [math.nan], 4: [math.nan]})
    with pytest.raises(UserError, match="2 steps in a row") as error:
        train.train(config)
    assert "bad_steps/step_00000004.safetensors" in str(error.value)
    monkeypatch.undo()
    # The weights before steps 3 and 4 are those the run stopped with.
    for step in (3, 4):
        assert replay_command([config.run_dir, str(step)]) == 0
        loss = recorded_loss(config, step)
        printed = capsys.readouterr().out
        assert f"recorded {loss:.9g}, relative difference 0.0e+00" in printed
        assert "grad_norm" in printed
        assert "no finite number" in printed


def test_bad_steps_stop_the_warm_start_too(make_config, monkeypatch):
    config = make_config(
        sft={"steps": 6, "batch_size": 4}, train={"max_bad_steps": 2}, eval={"at_start": False}
    )
    poison(monkeypatch, {1: [math.inf], 3: [math.nan], 4: [math.nan]})
    with pytest.raises(UserError, match="2 steps in a row") as error:
        sft.train(config)
    folder = Path(config.run_dir) / "bad_steps"
    assert f"{folder}/step_00000004.jsonl" in str(error.value)
    assert read_manifest(folder / "checkpoint").step == 5
    assert not (Path(config.run_dir) / "hf").exists()
    kept = {path.name for path in folder.glob("*.jsonl")}
    assert kept == {f"step_0000000{step}.jsonl" for step in (1, 3, 4)}
    examples = [json.loads(line) for line in (folder / "step_00000004.jsonl").open()]
    assert [set(each) for each in examples] == [
        {"problem", "prompt_ids", "response_ids", "loss_mask"}
    ] * 4


def test_an_alarm_stops_the_run_with_its_state_on_disk(make_config):
    """Rounding is beyond a threshold of 0; the checkpoints are those from before the alarm."""
    config = make_config(
        train={"steps": 6},
        checkpoint={"interval": 1, "keep": None},
        alarms={"log_prob_diff_warn": None, "log_prob_diff_stop": 1e-12, "in_a_row": 3},
    )
    with pytest.raises(
        UserError, match=r"step 2: the trainer's log-prob.* 3 times in a row"
    ) as error:
        train.train(config)
    folder = Path(config.run_dir) / "bad_steps/checkpoint"
    assert str(error.value).endswith(f"the state is {folder}")
    assert read_manifest(folder).step == 3
    assert [read_manifest(each).step for each, _ in whole_checkpoints(run_path(config))] == [1, 2]


def recorded_loss(config: Config, step: int) -> float:
    loss = read_step(Path(config.run_dir), step).metrics["train/loss"]
    assert loss is not None
    return loss


def test_a_replayed_step_has_the_same_loss_and_says_what_it_lacks(make_config, capsys):
    config = make_config(
        train={"steps": 5, "record_steps": "all", "global_batch_size": 6, "epochs_per_rollout": 2},
        checkpoint={"interval": 3, "keep": 1},
        teacher={"mode": "ema"},
        algorithm={"kl_coef": 0.05},
    )
    train.train(config)
    run = Path(config.run_dir)
    for step in (2, 4):  # checkpoints stand after steps 3 and 5, and one is kept
        assert replay_command([str(run), str(step)]) == 0
        assert capsys.readouterr().out.count("relative difference 0.0e+00") == 2
    (run / "recorded_steps/step_00000001.safetensors").unlink()
    assert replay_command([str(run), "4"]) == 2
    assert "steps [1] were not recorded" in capsys.readouterr().err
    assert replay_command([str(run), "1"]) == 2
    assert "step 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "section",
    [{"algorithm": {"tis": "sequence", "tis_clip": 1.0001}}, {"train": {"epochs_per_rollout": 2}}],
)
def test_a_step_recorded_without_the_old_policy_has_it_scored_again(make_config, tmp_path, section):
    """Its replay under settings that need those scores is what a run with them does."""
    recorded = make_config(
        train={"steps": 1, "record_steps": "all"}, algorithm={"rlsd_lambda": 0.5}
    )
    train.train(recorded)
    raw = recorded.model_dump(mode="json")
    for name, settings in section.items():
        raw[name] |= settings
    replayed = replay(Config.model_validate(raw), 0).metrics
    train.train(Config.model_validate(raw | {"run_dir": str(tmp_path / "other")}))
    (line,) = [m for m in read_metrics(tmp_path / "other/metrics.jsonl") if "train/loss" in m]
    for key in ("train/loss", "train/grad_norm", "train/ratio_max"):
        assert replayed[key] == line[key], key
    assert replayed["train/loss"] != recorded_loss(recorded, 0)


def test_a_replay_that_needs_scores_of_lost_weights_says_so(make_config):
    config = make_config(
        train={"steps": 1, "record_steps": "all"}, algorithm={"negative_only": True}
    )
    train.train(config)
    for settings, kind in (({"kl_coef": 0.1}, "ref"), ({"negative_only": False}, "teacher")):
        algorithm = config.algorithm.model_copy(update=settings)
        changed = config.model_copy(update={"algorithm": algorithm})
        with pytest.raises(UserError, match=f"without the {kind} log-probabilities"):
            replay(changed, 0)


def test_rollout_only_samples_what_training_would(make_config, tmp_path):
    trained = make_config(train={"steps": 2}, checkpoint={"interval": 1}, eval={"at_start": False})
    train.train(trained)
    sampled = make_config(
        run_dir=str(tmp_path / "sampled"),
        train={"steps": 1},
        eval={"at_start": False},
    )
    rollout_only.rollout_only(sampled)
    first = next(line for line in lines_of(trained) if "train/loss" in line)
    (line,) = lines_of(sampled)
    rollout = {key for key in line if key.startswith(("rollout/", "reward/"))}
    assert {key: line[key] for key in rollout} == {key: first[key] for key in rollout}
    assert not any(key.startswith("train/") for key in line)
    samples = Path("samples/step_000000.jsonl")

    def responses(config: Config) -> list[str]:
        rows = (Path(config.run_dir) / samples).read_text().splitlines()
        return [json.loads(row)["response"] for row in rows]

    assert responses(sampled) == responses(trained)
    later = make_config(
        run_dir=str(tmp_path / "later"),
        train={"steps": 1, "resume": str(run_path(trained) / "step_00000002")},
        eval={"at_start": False},
    )
    rollout_only.rollout_only(later)
    assert responses(later) != responses(sampled)


def test_a_warm_start_resumes_and_its_weights_start_training(make_config, tmp_path):
    def config(name: str, steps: int, **checkpoint: int) -> Config:
        return make_config(
            run_dir=str(tmp_path / name),
            sft={"steps": steps, "batch_size": 8},
            checkpoint=checkpoint,
            eval={"at_start": False, "num_problems": 2},
        )

    sft.train(config("half", 2, interval=1))
    sft.train(config("half", 4, interval=2))
    sft.train(config("whole", 4))
    half, whole = (
        [line for line in lines_of(config(name, 4)) if "train/loss" in line]
        for name in ("half", "whole")
    )
    assert half == whole
    rl = make_config(
        run_dir=str(tmp_path / "rl"),
        train={"steps": 1, "resume": str(tmp_path / "half/checkpoints/step_00000004")},
        teacher={"mode": "frozen", "hint": "none"},
    )
    train.train(rl)
    step = next(line for line in lines_of(rl) if "train/loss" in line)
    # The frozen teacher holds the weights that training started with.
    assert step["algorithm/gain_abs_max"] < 1e-5
    assert os.path.isfile(tmp_path / "rl/hf/final/config.json")
