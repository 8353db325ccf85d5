"""What an algorithm's name fixes, presets, and leaves to the user."""

from __future__ import annotations

import pytest

from megatron_rlsd.config import (
    AlgorithmConfig,
    Config,
    TeacherConfig,
    dump_config,
    load_config,
    parse_config,
)
from megatron_rlsd.config.variants import VARIANTS
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import ROOT

CONFIGS = ROOT / "examples/configs/algorithms"


def parse(algorithm: dict[str, object], **sections: object) -> Config:
    return parse_config(
        {
            "run_dir": "runs/x",
            "model": {"hf_path": "models/x"},
            "data": {"train": [{"kind": "jsonl", "path": "train.jsonl"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "algorithm": algorithm,
            **sections,
        }
    )


def test_every_algorithm_has_a_config_of_its_name():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(VARIANTS)
    for name in VARIANTS:
        assert load_config(CONFIGS / f"{name}.yaml").algorithm.name == name


def test_the_keys_of_the_table_exist():
    for name, variant in VARIANTS.items():
        assert {*variant.fixed, *variant.defaults} <= set(AlgorithmConfig.model_fields), name
        assert {*variant.teacher_fixed, *variant.teacher_defaults} <= set(
            TeacherConfig.model_fields
        ), name
        assert not variant.fixed.keys() & variant.defaults.keys(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_dumped_config_reads_back_equal(name, tmp_path):
    """Every key is set then, which must not count as a contradiction."""
    config = load_config(CONFIGS / f"{name}.yaml")
    dump_config(config, tmp_path / "dump.yaml")
    assert load_config(tmp_path / "dump.yaml") == config


@pytest.mark.parametrize(
    ("algorithm", "teacher", "message"),
    [
        (
            {"name": "gspo", "importance_ratio": "token"},
            {},
            "algorithm.importance_ratio='token' contradicts algorithm.name=gspo: its ratio is that",
        ),
        ({"name": "dr_grpo", "advantage": "group_std"}, {}, "drops the division by the rewards'"),
        (
            {"name": "dapo", "group_filter": False},
            {},
            "it samples on until groups hold right and wrong",
        ),
        ({"name": "cispo", "rlsd_lambda": 0.5}, {}, "it does not reweight tokens by evidence"),
        ({"name": "opsd", "advantage": "group_std"}, {}, "its loss does not use the reward"),
        ({"name": "rlrt", "evidence": "teacher_over_student"}, {}, "it reverses the teacher's"),
        ({"name": "sdar", "divergence_coef": 1.0}, {}, "it looks at the sampled tokens alone"),
        ({"name": "opd"}, {}, "opd needs teacher.hf_path"),
        ({"name": "opd"}, {"hf_path": "x", "hint": "answer"}, "teacher.hint='answer' contradicts"),
        (
            {"name": "opd"},
            {"hf_path": "x", "sglang": {"url": "y"}},
            "hf_path='x', teacher.sglang.u",
        ),
        ({"name": "rlsd"}, {"hf_path": "x"}, "teacher.hf_path='x' is for algorithm.name=opd"),
        ({"name": "grpo"}, {"sglang": {"url": "y"}}, "teacher.sglang.url='y' is for algorithm.na"),
        (
            {"name": "opd"},
            {"sglang": {"url": "y", "score_timeout_seconds": 1800}},
            "score_timeout_seconds=1800 must be below distributed.timeout_seconds=1800",
        ),
        (
            {"advantage": "own"},
            {},
            "an algorithm that brings a function for it, which rlsd does not",
        ),
        ({"name": "sft"}, {}, r"supervised training is a program: python -m megatron_rlsd\.sft"),
        ({"negative_only": True, "positive_only": True}, {}, "exclude each other"),
        ({"importance_ratio": "sequence", "objective": "log_prob"}, {}, "needs objective=clipped"),
        ({"advantage": "none"}, {}, "leaves nothing to learn from"),
        ({"name": "ppo"}, {}, "there is no algorithm 'ppo'; known: rlsd, grpo, dr_grpo"),
    ],
)
def test_contradictions_are_named_with_the_reason(algorithm, teacher, message):
    with pytest.raises(UserError, match=message):
        parse(algorithm, teacher=teacher)


def test_a_served_teacher_scores_at_temperature_one():
    served = {"sglang": {"url": "http://node7:30000"}}
    parse({"name": "opd"}, teacher=served)
    with pytest.raises(UserError, match=r"needs rollout.temperature=1, not 0.7: SGLang"):
        parse({"name": "opd"}, teacher=served, rollout={"temperature": 0.7})


def test_one_sample_is_nothing_to_compare_with():
    with pytest.raises(UserError, match="nothing to compare a response with"):
        parse({"name": "grpo"}, rollout={"n_samples_per_prompt": 1})
    parse({"name": "opsd"}, rollout={"n_samples_per_prompt": 1})


def test_presets_may_be_changed_and_a_fixed_value_repeated():
    assert AlgorithmConfig(name="gspo").eps_clip_low == 3e-4
    assert AlgorithmConfig(name="gspo", eps_clip_low=1e-3).eps_clip_low == 1e-3
    assert AlgorithmConfig(name="gspo", importance_ratio="sequence").dual_clip is None
    assert parse({"name": "sdpo"}).teacher.hint == "own_correct_response"
    assert parse({"name": "sdpo"}, teacher={"hint": "critique"}).teacher.hint == "critique"


def test_single_knobs_go_with_rlsd_and_grpo():
    mixed = AlgorithmConfig(
        name="rlsd", importance_ratio="sequence", advantage="leave_one_out", divergence_coef=0.1
    )
    assert mixed.scores_every_response
    assert AlgorithmConfig(name="grpo", objective="clipped_weight").objective == "clipped_weight"
    assert AlgorithmConfig(name="grpo", rlsd_lambda=0.8).name == "grpo"


def test_constants_of_an_algorithms_functions_are_checked_and_filled_in():
    assert AlgorithmConfig(name="rlcsd", params={"tau": 0.5}).params == {
        "tau": 0.5,
        "beta": 1.0,
        "delta": 0.02,
        "eta": 1.0,
    }
    with pytest.raises(UserError, match="params: rlcsd has no sigma; it has: tau, beta, delta"):
        parse({"name": "rlcsd", "params": {"sigma": 1}})
    with pytest.raises(UserError, match="params: grpo has no tau; it has none"):
        parse({"name": "grpo", "params": {"tau": 1}})
    with pytest.raises(UserError, match="own_hints is for an algorithm that brings a function"):
        parse({"evidence": "own_hints"})


def test_interpolated_old_log_probs_go_with_a_weight_in_the_loss_alone():
    between = {"off_policy": {"old_log_probs": "interpolated"}}
    assert AlgorithmConfig(**between, tis="token").tis == "token"
    with pytest.raises(UserError, match="old_log_probs=interpolated and tis=sequence exclude"):
        parse({**between, "tis": "sequence"})
    with pytest.raises(UserError, match="old_log_probs=interpolated is about a ratio"):
        parse({**between, "name": "rloo"})
