import pytest

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.parallel.layout import LayoutError, ModelShape, check_layout

SHAPE = ModelShape(num_layers=6, num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world"), [(1, 1, 1), (3, 1, 3), (3, 2, 6), (1, 6, 12), (1, 1, 5)]
)
def test_possible_layouts_pass(tensor, pipeline, world):
    check_layout(ParallelConfig(tensor=tensor, pipeline=pipeline), world, SHAPE)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world", "message"),
    [
        (
            2,
            1,
            2,
            "parallel.tensor=2 does not divide the model's 9 attention heads; valid: 1, 3, 9",
        ),
        (9, 1, 9, "parallel.tensor=9 does not divide the model's 3 KV heads; valid: 1, 3"),
        (1, 4, 4, "parallel.pipeline=4 does not divide the model's 6 layers; valid: 1, 2, 3, 6"),
        (3, 2, 4, "= 6 must divide the number of processes, 4"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(tensor, pipeline, world, message):
    with pytest.raises(LayoutError) as error:
        check_layout(ParallelConfig(tensor=tensor, pipeline=pipeline), world, SHAPE)
    assert message in str(error.value)


def test_every_misfit_is_listed():
    with pytest.raises(LayoutError) as error:
        check_layout(ParallelConfig(tensor=5, pipeline=4), 7, SHAPE)
    assert str(error.value).count("parallel.tensor=5 does not divide") == 3
    assert "pipeline=4" in str(error.value)
