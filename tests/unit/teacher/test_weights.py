import pytest
import torch

from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.teacher import Teacher


@pytest.fixture
def parameters():
    return {"0.w": torch.nn.Parameter(torch.tensor([1.0, 2.0]))}


def seen_by_teacher(teacher, parameters):
    with teacher.applied():
        return parameters["0.w"].data.clone().tolist()


def set_weights(parameters, values):
    parameters["0.w"].data.copy_(torch.tensor(values))


def test_live_follows_the_student(parameters):
    teacher = Teacher(TeacherConfig(mode="live"), parameters)
    set_weights(parameters, [5.0, 6.0])
    assert seen_by_teacher(teacher, parameters) == [5.0, 6.0]


def test_frozen_keeps_the_initial_weights(parameters):
    teacher = Teacher(TeacherConfig(mode="frozen"), parameters)
    set_weights(parameters, [5.0, 6.0])
    assert not teacher.after_step(0)
    assert seen_by_teacher(teacher, parameters) == [1.0, 2.0]


def test_periodic_refreshes_after_every_interval(parameters):
    teacher = Teacher(TeacherConfig(mode="periodic", interval=2), parameters)
    set_weights(parameters, [5.0, 6.0])
    assert not teacher.after_step(0)
    assert seen_by_teacher(teacher, parameters) == [1.0, 2.0]
    assert teacher.after_step(1)
    assert seen_by_teacher(teacher, parameters) == [5.0, 6.0]


def test_ema_averages_in_float32_below_the_weights_own_precision():
    parameters = {"0.w": torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))}
    teacher = Teacher(TeacherConfig(mode="ema", ema_decay=0.999), parameters)
    parameters["0.w"].data.fill_(2.0)
    # Each step moves the average by less than bfloat16 resolves near 1 (1/128).
    for step in range(30):
        teacher.after_step(step)
    expected = 2.0 - 0.999**30
    with teacher.applied():
        assert parameters["0.w"].dtype == torch.bfloat16
        assert parameters["0.w"].item() == pytest.approx(expected, abs=1 / 128)
        assert parameters["0.w"].item() != 1.0
    assert parameters["0.w"].item() == 2.0


def test_the_student_is_intact_after_an_error_inside(parameters):
    teacher = Teacher(TeacherConfig(mode="frozen"), parameters)
    set_weights(parameters, [5.0, 6.0])
    storage = parameters["0.w"].data.data_ptr()
    with pytest.raises(KeyError), teacher.applied():
        raise KeyError
    assert parameters["0.w"].tolist() == [5.0, 6.0]
    assert parameters["0.w"].data.data_ptr() == storage
