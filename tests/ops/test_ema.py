"""The teacher's moving average."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError

SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 3, 11)]
# shapes of the teacher's tensors, decay, scale of the values, offset
CASES = {
    "one_value": ([(1,)], 0.996, 1.0, 0.0),
    "a_scalar": ([()], 0.996, 1.0, 0.0),
    "no_values": ([(0,), (3, 0)], 0.5, 1.0, 0.0),
    "prime_sizes": ([(131,), (37, 13), (7, 11, 3)], 0.99, 1.0, 0.0),
    "a_large_matrix": ([(1024, 1031)], 0.996, 1.0, 0.0),
    "many_small_ones": ([(5,)] * 500, 0.996, 1.0, 0.0),
    "unlike_sizes": ([(1,), (100_003,), (2, 3), (257, 255)], 0.9, 1.0, 0.0),
    "decay_0": ([(33, 5)], 0.0, 1.0, 0.0),
    "decay_1": ([(33, 5)], 1.0, 1.0, 0.0),
    "decay_near_1": ([(33, 5)], 0.9999, 1.0, 0.0),
    "tiny_values": ([(64, 9)], 0.996, 1e-30, 0.0),
    "huge_values": ([(64, 9)], 0.996, 1e30, 0.0),
    "far_from_zero": ([(64, 9)], 0.996, 1e-3, 100.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    shapes, decay, scale, offset = CASES[name]
    teacher, student = (
        [(offset + scale * torch.randn(shape, device=device)).to(dtype) for shape in shapes]
        for _ in range(2)
    )
    expected = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(teacher, student)]
    ops.ema_update(teacher, student, decay)
    for t, e in zip(teacher, expected):
        # two units of the larger of teacher and student
        size = max([offset, *e.abs().flatten()[:1].tolist()]) + 5 * scale
        torch.testing.assert_close(
            t.double(), e, rtol=0, atol=2 * torch.finfo(dtype).eps * float(size)
        )
        if decay in (0.0, 1.0) and e.numel():
            assert torch.equal(t.double(), e)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_views_of_one_buffer(device):
    """Parameters that lie side by side, transposed and with gaps."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    buffer = torch.randn(40, 6, device=device)
    teacher = [buffer[:10].T, buffer[10:30:2], buffer[31]]
    student = [torch.randn(t.shape, device=device) for t in teacher]
    before, gaps = [t.clone() for t in teacher], buffer[11:30:2].clone()
    ops.ema_update(teacher, student, 0.75)
    for t, b, s in zip(teacher, before, student):
        torch.testing.assert_close(t, 0.75 * b + 0.25 * s)
    assert torch.equal(buffer[11:30:2], gaps)


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
