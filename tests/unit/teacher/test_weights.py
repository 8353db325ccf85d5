import pytest
import torch

from megatron_rlsd.config import TeacherConfig
from megatron_rlsd.runtime.host_memory import ALIGNMENT
from megatron_rlsd.teacher import Teacher
from tests.memory import span


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


@pytest.mark.parametrize(
    ("mode", "dtype", "beside"),
    [("frozen", torch.float32, 0), ("periodic", torch.bfloat16, 0), ("ema", torch.bfloat16, 2)],
)
def test_the_teacher_computes_in_the_students_own_memory(mode, dtype, beside):
    """No second copy of the model on the device: not even the parameters' addresses change."""
    buffer = torch.arange(64.0).to(dtype)  # as Megatron's, which parameters are views of
    before = buffer.clone()
    parameters = {
        name: torch.nn.Parameter(buffer[first : first + 8 * n].view(n, 8))
        for name, first, n in (("0.a", 0, 3), ("0.b", 32, 4))
    }
    teacher = Teacher(TeacherConfig(mode=mode, ema_decay=0.5), parameters)
    snapshot = teacher.snapshot
    kept = {name: value.clone() for name, value in snapshot.tensors.items()}
    addresses = {name: value.data_ptr() for name, value in snapshot.tensors.items()}
    own = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    buffer.mul_(-3)
    student = buffer.clone()
    for _ in range(2):
        with teacher.applied():
            assert {name: p.data_ptr() for name, p in parameters.items()} == own
            assert torch.equal(buffer[:24], before[:24])
            assert torch.equal(buffer[32:], before[32:])
        assert torch.equal(buffer, student)
        for name, value in kept.items():
            assert torch.equal(snapshot.tensors[name], value)
    assert {name: value.data_ptr() for name, value in snapshot.tensors.items()} == addresses
    # One block for the snapshot; another for the student only where float32 would lose to 16 bits.
    assert span(snapshot.tensors.values()) <= len(kept) * 2 * ALIGNMENT
    assert (len(snapshot._away[1]) if snapshot._away else 0) == beside


def test_a_parameter_that_cannot_be_exchanged_leaves_all_others_as_they_were(monkeypatch):
    parameters = {str(i): torch.nn.Parameter(torch.full((3,), float(i))) for i in range(4)}
    teacher = Teacher(TeacherConfig(mode="frozen"), parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(10)
    real, calls = torch.empty, []

    def empty(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return real(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError), teacher.applied():
        pass
    assert [p[0].item() for p in parameters.values()] == [10, 11, 12, 13]
    assert [v[0].item() for v in teacher.snapshot.tensors.values()] == [0, 1, 2, 3]
