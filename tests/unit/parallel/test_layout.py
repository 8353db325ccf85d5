from dataclasses import replace

import pytest

from megatron_rlsd.config import ParallelConfig, parse_config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.layout import LayoutError, check_layout, layers_of_stage
from megatron_rlsd.runtime.errors import UserError

SHAPE = ModelDims(
    num_layers=6,
    num_attention_heads=9,
    num_query_groups=3,
    ffn_hidden_size=1536,
    hidden_size=72,
    head_dim=8,
    vocab_size=1000,
    padded_vocab_size=1000,
    tied_embeddings=False,
)
EXPERTS = replace(
    SHAPE,
    num_attention_heads=8,
    num_query_groups=4,
    moe_layers=frozenset(range(6)),
    num_experts=12,
    expert_ffn_size=40,
)


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        ({}, 1),
        ({}, 5),
        ({"tensor": 3}, 3),
        ({"tensor": 3, "pipeline": 2}, 6),
        ({"pipeline": 6}, 12),
        ({"context": 5}, 10),
        ({"pipeline": 3, "virtual_pipeline": 2}, 3),
        ({"pipeline": 2, "pipeline_first_stage_layers": 1}, 2),
        (
            {
                "pipeline": 4,
                "pipeline_first_stage_layers": 1,
                "pipeline_last_stage_layers": 1,
            },
            4,
        ),
    ],
)
def test_possible_layouts_pass(parallel, world):
    check_layout(ParallelConfig(**parallel), world, SHAPE)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            {"tensor": 2},
            2,
            "parallel.tensor=2 does not divide the model's 9 attention heads; valid: 1, 3, 9",
        ),
        (
            {"tensor": 9},
            9,
            "parallel.tensor=9 does not divide the model's 3 KV heads; valid: 1, 3",
        ),
        (
            {"pipeline": 4},
            4,
            "parallel.pipeline=4 does not divide the model's 6 layers; valid: 1, 2, 3, 6",
        ),
        (
            {"tensor": 3, "pipeline": 2},
            4,
            "parallel.tensor=3 x parallel.pipeline=2 = 6 must divide the number of processes, 4; "
            "start 6, or choose sizes whose product is one of: 1, 2, 4",
        ),
        ({"context": 3}, 7, "parallel.context=3 = 3 must divide the number of processes, 7; "),
        ({"context": 3}, 7, "start 6 or 9, or choose"),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            2,
            "parallel.virtual_pipeline=2 does not divide the model's 3 layers of a stage; "
            "valid: 1, 3",
        ),
        (
            {"pipeline": 3, "pipeline_first_stage_layers": 1},
            3,
            "parallel.pipeline_first_stage_layers=1 leave 5 of the model's 6 layers to 2 other "
            "stages, which must share them evenly; valid: 2, 4",
        ),
        (
            {"pipeline": 2, "pipeline_first_stage_layers": 1, "pipeline_last_stage_layers": 3},
            2,
            "leave 2 of the model's 6 layers to 0 other stages, which must share them evenly; "
            "valid sums: 6",
        ),
        (
            {"pipeline": 2, "pipeline_first_stage_layers": 2, "virtual_pipeline": 4},
            2,
            "parallel.virtual_pipeline=4 does not divide the model's 2 layers of a stage",
        ),
        ({"expert": 2}, 2, "parallel.expert=2 needs a mixture-of-experts model"),
        ({"expert_tensor": 2}, 2, "parallel.expert_tensor=2 needs a mixture-of-experts model"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(parallel, world, message):
    with pytest.raises(LayoutError) as error:
        check_layout(ParallelConfig(**parallel), world, SHAPE)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        ({"expert": 4}, 4),
        ({"expert": 12, "context": 3}, 12),
        ({"tensor": 2, "sequence": True, "expert": 2}, 4),
        ({"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}, 2),
        ({"tensor": 2, "sequence": True, "expert_tensor": 1}, 2),
        ({"tensor": 4, "sequence": True, "expert": 2, "expert_tensor": 2}, 4),
    ],
)
def test_possible_expert_layouts_pass(parallel, world):
    check_layout(ParallelConfig(**parallel), world, EXPERTS)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            {"expert": 5},
            5,
            "parallel.expert=5 does not divide the model's 12 experts; valid: 1, 2, 3, 4, 6, 12",
        ),
        (
            {"expert": 4},
            6,
            "parallel.expert=4 x parallel.expert_tensor=1 = 4 must divide the 6 processes of a "
            "pipeline stage; valid products: 1, 2, 3, 6",
        ),
        (
            {"expert": 2, "expert_tensor": 3},
            6,
            "parallel.expert_tensor=3 does not divide the model's 40 rows of an expert; valid: 1, ",
        ),
        ({"tensor": 2}, 2, "parallel.tensor=2 with experts needs parallel.sequence=true"),
    ],
)
def test_impossible_expert_layouts_are_refused_with_the_numbers(parallel, world, message):
    with pytest.raises(LayoutError) as error:
        check_layout(ParallelConfig(**parallel), world, EXPERTS)
    assert message in str(error.value)


def test_a_rank_without_vocabulary_is_refused():
    shape = replace(EXPERTS, moe_layers=frozenset(), vocab_size=5)
    with pytest.raises(LayoutError, match="without any of the model's 5 vocabulary rows"):
        check_layout(ParallelConfig(tensor=4), 4, shape)


def test_every_misfit_is_listed():
    with pytest.raises(LayoutError) as error:
        check_layout(ParallelConfig(tensor=5, pipeline=4), 7, SHAPE)
    assert str(error.value).count("parallel.tensor=5 does not divide") == 3
    assert "pipeline=4" in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"pipeline": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"pipeline": 2, "virtual_pipeline": 2}, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ({"pipeline": 3, "pipeline_first_stage_layers": 2}, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (
            {"pipeline": 2, "pipeline_last_stage_layers": 2, "virtual_pipeline": 2},
            [[0, 1, 2, 4, 5, 6], [3, 7]],
        ),
    ],
)
def test_layers_of_each_stage(parallel, expected):
    config = ParallelConfig(**parallel)
    assert [layers_of_stage(config, 8, stage) for stage in range(config.pipeline)] == expected


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"sequence": True}, "sequence=true needs tensor > 1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline=2 needs pipeline > 1"),
        ({"pipeline_last_stage_layers": 2}, "pipeline_last_stage_layers=2 needs pipeline > 1"),
        (
            {"tensor": 4, "sequence": True, "context": 8},
            "max_tokens_per_microbatch=60 is less than 64",
        ),
    ],
)
def test_settings_that_need_each_other(parallel, message):
    with pytest.raises(UserError, match=message):
        parse_config(
            {
                "run_dir": "unused",
                "model": {"hf_path": "unused"},
                "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
                "reward": {"functions": [{"name": "exact_match"}]},
                "train": {"max_tokens_per_microbatch": 60},
                "parallel": parallel,
            }
        )
