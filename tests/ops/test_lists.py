"""What a step does to all tensors at once: norm of the gradients, by every kernel of a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gmm_jepa import ops
from gmm_jepa.ops import fused, native
from gmm_jepa.ops.lists import total_norm

# shapes, scale
CASES = {
    "one value": ([(1,)], 1.0),
    "a scalar": ([()], 1.0),
    "nothing": ([(0,), (3, 0)], 1.0),
    "prime sizes": ([(131,), (37, 13), (7, 11, 3)], 1.0),
    "several pieces": ([(100_003,), (2, 3), (257, 255)], 1.0),
    "many": ([(5,)] * 500, 1.0),
    "squares beyond float32": ([(64, 9), (17,)], 1e30),
    "squares below float32": ([(64, 9), (17,)], 1e-30),
}


@pytest.fixture(params=[*native.instruction_sets(), "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fused, "has_native", False)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


@pytest.mark.parametrize("name", CASES)
def test_total_norm(name, kernel):
    shapes, scale = CASES[name]
    if kernel == "torch" and scale != 1.0:
        pytest.skip("torch's squares leave float32's range")
    torch.manual_seed(0)
    tensors = [scale * torch.randn(shape) for shape in shapes]
    expected = torch.cat([t.double().flatten() for t in tensors]).norm()
    got = total_norm(tensors)
    assert got.dtype == torch.float32
    assert got.shape == ()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.996, 1.0])
def test_moving_average(decay, kernel):
    torch.manual_seed(0)
    shapes = [(), (7,), (0, 4), (37, 13), (40_003,)]
    teacher, student = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected = [decay * t.double() + (1 - decay) * s.double() for t, s in zip(teacher, student)]
    ops.ema_update(teacher, student, decay)
    for t, e in zip(teacher, expected):
        torch.testing.assert_close(t.double(), e, rtol=0, atol=1e-6)
        assert decay not in (0.0, 1.0) or torch.equal(t.double(), e)


def test_the_same_bits_on_one_thread_and_two():
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (100_003, 5, 40_000)]
    threads = torch.get_num_threads()
    try:
        norms = []
        for n in (1, 2):
            torch.set_num_threads(n)
            norms.append(total_norm(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*norms)


def test_the_defaults_of_torch_change_nothing():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert total_norm([torch.ones(3, dtype=torch.float32)]).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_what_is_not_finite_shows(rubbish, kernel):
    tensors = [torch.randn(40), torch.randn(3, 3)]
    tensors[0][33] = rubbish
    assert not total_norm(tensors).isfinite()


def test_strides_and_types_are_left_to_torch():
    turned = [torch.randn(5, 7).T, torch.randn(4, dtype=torch.float64)]
    expected = nn.utils.get_total_norm(turned)
    torch.testing.assert_close(total_norm(turned), expected)
