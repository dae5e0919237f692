"""The teacher's moving average."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 11)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_average_in_place(decay, dtype):
    teacher = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    student = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    before = [t.clone() for t in student]
    expected = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(teacher, student)]
    places = [t.data_ptr() for t in teacher]
    assert ops.ema_update(teacher, student, decay) is None
    assert [t.data_ptr() for t in teacher] == places
    for t, e in zip(teacher, expected):
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(s, b) for s, b in zip(student, before))


def test_parameters_of_a_student_may_require_a_gradient():
    teacher, student = torch.zeros(3), torch.ones(3, requires_grad=True)
    ops.ema_update([teacher], [student], 0.9)
    torch.testing.assert_close(teacher, torch.full((3,), 0.1))
    assert not teacher.requires_grad


def test_nothing_to_do():
    ops.ema_update([], [], 0.9)


def test_user_errors():
    one, two = torch.zeros(2), torch.zeros(3)
    with pytest.raises(InputError, match=r"decay: expected 0 to 1, got 1\.5"):
        ops.ema_update([one], [one.clone()], 1.5)
    with pytest.raises(InputError, match="student: expected as many tensors"):
        ops.ema_update([one], [], 0.5)
    with pytest.raises(InputError, match=r"student\[0\]"):
        ops.ema_update([one], [two], 0.5)


def test_registration_holds_what_it_promises():
    tensors = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    torch.library.opcheck(torch.ops.gmm_jepa.ema_update.default, (*tensors, 0.9))


def test_no_graph_break():
    compiled = torch.compile(ops.ema_update, fullgraph=True, backend="aot_eager")
    teacher, student = [torch.zeros(4), torch.zeros(2, 2)], [torch.ones(4), torch.ones(2, 2)]
    compiled(teacher, student, 0.75)
    torch.testing.assert_close(teacher[1], torch.full((2, 2), 0.25))
