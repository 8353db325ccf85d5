"""The whole loop in one process: what a run writes, and identities the mathematics demands."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from megatron_rlsd import sft, train
from megatron_rlsd.checkpoint.manifest import whole_checkpoints
from megatron_rlsd.observability import read_metrics
from tests.full_logits import full_logits_in_the_actor

TIMINGS = ("time", "perf/", "memory/")


def steps_of(config) -> list[dict[str, float]]:
    """Per-step metrics of a run, without timings."""
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if not k.startswith(TIMINGS)}
        for line in lines
        if "train/loss" in line
    ]


def run(config) -> list[dict[str, float]]:
    train.train(config)
    return steps_of(config)


def test_a_run_writes_what_it_promises(make_config):
    config = make_config()
    steps = run(config)
    assert [step["step"] for step in steps] == [0, 1, 2]
    expected = [
        "rollout/reward_mean",
        "rollout/reward_std",
        "rollout/solved_share",
        "rollout/group_filter_share",
        "rollout/zero_advantage_share",
        "rollout/response_tokens_mean",
        "train/clip_low_share",
        "train/clip_high_share",
        "train/approx_kl",
        "train/entropy",
        "train/grad_norm",
        "train/lr",
        "algorithm/lambda",
        "algorithm/gain_mean",
        "algorithm/gain_abs_mean",
        "algorithm/evidence_weight_mean",
        "algorithm/evidence_weight_clipped_mean",
        "algorithm/evidence_clip_low_share",
        "algorithm/evidence_clip_high_share",
        "train/rollout_log_prob_diff_mean",
        "train/rollout_log_prob_diff_max",
        "teacher/skipped_share",
        "score/tokens",
    ]
    for step in steps:
        assert [name for name in expected if name not in step] == []
        # The embedded engine (transformers) and the Megatron actor are two implementations.
        assert step["train/rollout_log_prob_diff_max"] < 1e-4
        assert step["train/ratio_mean"] == pytest.approx(1.0)
    run_dir = Path(config.run_dir)
    samples = [json.loads(line) for line in (run_dir / "samples/step_000001.jsonl").open()]
    assert {sample["weight_version"] for sample in samples} == {1}
    for phase in ("rollout", "score", "update"):
        for line in read_metrics(run_dir / "metrics.jsonl"):
            assert "train/loss" not in line or line[f"perf/{phase}_tokens_per_second"] > 0
    evaluations = [m for m in read_metrics(run_dir / "metrics.jsonl") if "train/loss" not in m]
    assert [e["step"] for e in evaluations] == [0, 3]
    assert {
        "eval/chain_sum/greedy_pass@1",
        "eval/chain_sum/sampled_pass@2",
        "eval/chain_sum/greedy_leakage_phrase_share",
        "eval/chain_sum/sampled_leakage_answer_first_share",
    } <= set(evaluations[0])


def test_the_exported_model_is_the_trained_one(make_config, tiny_model):
    config = make_config(train={"steps": 1})
    run(config)
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        Path(config.run_dir) / "hf/final", dtype=torch.float32
    )
    initial = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    moved = [
        name
        for (name, a), (_, b) in zip(
            initial.named_parameters(), exported.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    ]
    assert "model.layers.3.mlp.down_proj.weight" in moved
    assert "model.embed_tokens.weight" in moved


def test_a_step_equals_one_with_full_logits(make_config):
    """Everything but the head alike; rollouts are the same, so one step is what can be compared."""
    runs = {}
    for head in ("fused", "full"):
        config = make_config(run_dir=make_config().run_dir + f"_{head}", train={"steps": 1})
        with full_logits_in_the_actor() if head == "full" else nullcontext():
            (step,) = run(config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(config.run_dir) / "hf/final", dtype=torch.float32
        )
        runs[head] = step, model.state_dict()
    (fused, weights), (full, expected) = runs["fused"], runs["full"]
    for name in ("rollout/reward_mean", "train/loss", "train/grad_norm", "algorithm/gain_abs_mean"):
        assert fused[name] == pytest.approx(full[name], rel=1e-5), name
    error = max(float((weights[k] - w).norm() / w.norm()) for k, w in expected.items())
    assert 0 < error < 1e-5


def test_runs_with_one_seed_are_identical_and_with_two_differ(make_config):
    first = run(make_config(run_dir=make_config().run_dir + "_a"))
    again = run(make_config(run_dir=make_config().run_dir + "_b"))
    other = run(make_config(run_dir=make_config().run_dir + "_c", train={"steps": 3, "seed": 1}))
    assert first == again
    assert first[0]["train/loss"] != other[0]["train/loss"]


def test_lambda_zero_is_grpo_exactly(make_config):
    grpo = run(make_config(algorithm={"name": "grpo"}))
    rlsd = run(make_config(algorithm={"name": "rlsd", "rlsd_lambda": 0.0}))
    assert grpo == rlsd
    assert all(step["teacher/skipped_share"] == 1 for step in rlsd)
    assert not any("algorithm/gain_mean" in step for step in rlsd)
    credited = run(make_config())
    assert credited[1]["train/loss"] != rlsd[1]["train/loss"]


def test_a_live_teacher_with_the_same_prompt_gains_nothing(make_config):
    # At another temperature than 1: a teacher scored at 1 would show.
    rollout = {"prompts_per_step": 3, "n_samples_per_prompt": 4, "max_response_tokens": 12}
    same = make_config(
        teacher={"mode": "live", "hint": "none"}, rollout={**rollout, "temperature": 0.6}
    )
    for step in run(same):
        assert step["algorithm/gain_abs_max"] < 1e-5
        assert step["algorithm/evidence_weight_mean"] == pytest.approx(1.0, abs=1e-6)
    hinted = run(make_config(teacher={"mode": "live"}))
    assert hinted[0]["algorithm/gain_abs_mean"] > 1e-3


def test_a_frozen_teacher_drifts_from_the_student(make_config):
    """With identical prompts the gain is the student's own drift from the initial weights."""
    steps = run(make_config(teacher={"mode": "frozen", "hint": "none"}))
    assert steps[0]["algorithm/gain_abs_max"] < 1e-5
    assert steps[2]["algorithm/gain_abs_mean"] > 1e-3
    refreshed = run(make_config(teacher={"mode": "periodic", "interval": 2, "hint": "none"}))
    assert refreshed[1]["algorithm/gain_abs_mean"] > 1e-3
    assert refreshed[2]["algorithm/gain_abs_max"] < 1e-5


def test_several_updates_per_rollout_use_the_old_policy(make_config):
    config = make_config(
        train={"steps": 2, "global_batch_size": 6, "epochs_per_rollout": 2}, optimizer={"lr": 0.01}
    )
    steps = run(config)
    for step in steps:
        assert abs(step["train/ratio_max"] - 1) > 1e-2
        assert step["train/approx_kl"] > 0
    clipped = [step["train/clip_low_share"] + step["train/clip_high_share"] for step in steps]
    assert max(clipped) > 0


def test_kl_to_the_initial_policy_starts_at_zero_and_grows(make_config):
    steps = run(make_config(algorithm={"kl_coef": 0.1}, optimizer={"lr": 0.01}))
    assert steps[0]["train/ref_kl"] == pytest.approx(0, abs=1e-6)
    assert steps[2]["train/ref_kl"] > 1e-3


def test_group_filter_refills_and_keeps_the_batch_size(make_config, tmp_path):
    reward = tmp_path / "rare.py"
    reward.write_text(
        "def rare(sample):\n"
        "    return float(sample.problem.answer.startswith('1') and '1' in sample.response)\n"
    )
    config = make_config(
        algorithm={"group_filter": True, "max_refills": 2},
        reward={"functions": [{"name": f"{reward}:rare"}]},
        train={"steps": 2},
    )
    steps = run(config)
    assert any(step["rollout/group_filter_share"] > 0 for step in steps)
    for step in steps:
        samples = Path(config.run_dir) / f"samples/step_{int(step['step']):06d}.jsonl"
        assert len(samples.read_text().splitlines()) == 3 * 4


def test_equal_rewards_leave_the_weights_to_weight_decay(make_config, tmp_path):
    """All advantages 0: no gradient, no teacher pass, and the step still ends."""
    reward = tmp_path / "flat.py"
    reward.write_text("def flat(sample):\n    return 0.5\n")
    config = make_config(
        reward={"functions": [{"name": f"{reward}:flat"}]}, optimizer={"weight_decay": 0.0}
    )
    steps = run(config)
    for step in steps:
        assert step["train/grad_norm"] == 0
        assert step["rollout/zero_advantage_share"] == 1
        assert step["teacher/skipped_share"] == 1


def test_sft_lowers_the_cross_entropy_from_that_of_a_random_model(make_config):
    config = make_config(
        sft={"steps": 12, "batch_size": 16, "privileged_share": 0.5}, optimizer={"lr": 5e-3}
    )
    sft.train(config)
    steps = steps_of(config)
    vocabulary = json.loads((Path(config.model.hf_path) / "config.json").read_text())["vocab_size"]
    assert steps[0]["train/loss"] == pytest.approx(math.log(vocabulary), abs=0.5)
    assert steps[-1]["train/loss"] < 0.75 * steps[0]["train/loss"]


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["core_attn"]},
        {"recompute": "selective", "recompute_modules": ["layernorm", "mlp"]},
    ],
    ids=["full", "core_attn", "layernorm_mlp"],
)
def test_recompute_changes_nothing(make_config, recompute):
    plain = run(make_config())
    recomputed = run(make_config(model=recompute))
    for a, b in zip(plain, recomputed, strict=True):
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-6)
        assert a["rollout/reward_mean"] == b["rollout/reward_mean"]


def test_the_warm_start_ends_at_the_accuracy_asked_for(make_config):
    """Random weights name the right digit now and then, but not always."""
    sections = {
        "reward": {"functions": [{"name": "exact_match", "params": {"pattern": "([0-9])"}}]},
        "eval": {"interval": 2, "num_problems": 64, "n_samples": 4, "greedy": False},
        "optimizer": {"lr": 1e-4},
    }
    reached = make_config(
        sft={"steps": 6, "stop_at_accuracy": 0.001}, checkpoint={"interval": 4}, **sections
    )
    for _ in range(2):  # a run that is over does nothing when it is started again
        sft.train(reached)
        assert len(steps_of(reached)) == 2
        saved = whole_checkpoints(Path(reached.run_dir) / "checkpoints")
        assert [manifest.step for _, manifest in saved] == [2]
    missed = make_config(
        run_dir=reached.run_dir + "_b", sft={"steps": 6, "stop_at_accuracy": 1.0}, **sections
    )
    sft.train(missed)
    assert len(steps_of(missed)) == 6
