"""Kernels of the residual unit against float64: output and all five gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gmm_jepa.kernels import residual_unit as kernel
from gmm_jepa.kernels import residual_unit_backward as kernel_backward
from torch import Tensor

from bench.null_cuda.interpreter import mend_the_interpreter
from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.frontend import ResidualBlock
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.ops import fused, residual, triton_residual

from .strides import moved

mend_the_interpreter()
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("output", "x", "weight1", "bias1", "weight2", "bias2")


class Case(NamedTuple):
    """What the op takes, and the gradient that comes back to it."""

    x: Tensor  # (B, T, C)
    parameters: tuple[Tensor, ...]  # (C, C, 3), (C,), (C, C, 3), (C,)
    lengths: Tensor | None  # (B,)
    dilation: int
    cotangent: Tensor  # (B, T, C)

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """Parameters stay in float32, as under autocast; so do strides."""
        x, cotangent = (moved(t, device, dtype) for t in (self.x, self.cotangent))
        parameters = tuple(p.to(device) for p in self.parameters)
        lengths = None if self.lengths is None else moved(self.lengths, device)
        return Case(x, parameters, lengths, self.dilation, cotangent)


def drawn(B: int, T: int, C: int, dilation: int, lengths: tuple[int, ...] | None = None) -> Case:
    torch.manual_seed(B + T + C + dilation)
    x, cotangent = torch.randn(2, B, T, C)
    weights = torch.randn(2, C, C, 3) / (3 * C) ** 0.5
    biases = torch.randn(2, C)
    parameters = (weights[0], biases[0], weights[1], biases[1])
    if lengths is None:
        return Case(x, parameters, None, dilation, cotangent)
    lengths = torch.tensor(lengths)
    return Case(x * frame_mask(lengths, T).keep, parameters, lengths, dilation, cotangent)


def _strided() -> Case:
    """x channels-first, the gradient every other channel of a wider one, lengths every other."""
    case = drawn(2, 70, 32, 3, (70, 21))
    wide = torch.randn(2, 70, 64)
    lengths = torch.stack((case.lengths, case.lengths), 1).int()[:, 0]
    return case._replace(x=case.x.mT.contiguous().mT, cotangent=wide[..., ::2], lengths=lengths)


CASES: dict[str, Callable[[], Case]] = {
    "one_frame": lambda: drawn(1, 1, 16, 1),
    "fewer_frames_than_a_tap_reaches": lambda: drawn(2, 20, 32, 125, (20, 7)),
    "as_many_frames_as_a_tap_reaches": lambda: drawn(1, 25, 64, 25),
    "wide_dilation": lambda: drawn(1, 200, 64, 125, (170,)),
    "ragged": lambda: drawn(3, 131, 64, 25, (131, 1, 0)),
    "block_edge": lambda: drawn(2, 128, 64, 3, (64, 128)),
    "few_channels": lambda: drawn(2, 150, 16, 3, (150, 140)),
    "channels_of_no_power_of_two": lambda: drawn(1, 66, 48, 3),
    "more_channels": lambda: drawn(3, 140, 128, 25, (140, 1, 0)),
    "more_channels_all_frames_real": lambda: drawn(1, 70, 128, 125),
    "most_channels_of_the_conformer": lambda: drawn(1, 40, 256, 1, (33,)),
    "strided": _strided,
    "large_values": lambda: drawn(2, 50, 32, 1, (50, 11))._replace(
        x=100 * drawn(2, 50, 32, 1, (50, 11)).x
    ),
}


def results(case: Case, form=triton_residual) -> tuple[list[Tensor], Tensor]:
    """Output and gradients, and what is kept for them."""
    inputs = (case.x, *case.parameters, case.lengths, case.dilation)
    out, hidden = form.residual_unit(*inputs, True, False)
    x, *others = inputs
    gradients = form.residual_unit_backward(case.cotangent, x, hidden, *others, False)
    return [out, *gradients], hidden


class Plain:
    """The form that the op is defined by."""

    residual_unit = staticmethod(residual.residual_unit_reference)
    residual_unit_backward = staticmethod(residual.residual_unit_backward_reference)


def by_definition(case: Case, kept: Tensor, through: torch.dtype = F64) -> list[Tensor]:
    """Output and gradients in float64, a tap at a time.

    Args:
        case: what to compute.
        kept: tells the side of the kink each hidden value is on, which rounding may change.
        through: dtype that leaky ReLUs and weights are rounded to, on the way there alone.
    """

    def rounded(t: Tensor) -> Tensor:
        return t + (t.to(through).double() - t).detach()

    def convolution(a: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        padded = torch.nn.functional.pad(a, (0, 0, dilation, dilation))
        taps = (padded[:, k * dilation : k * dilation + T] @ weight[..., k].T for k in range(3))
        return bias + sum(taps)

    leaves = [t.detach().double().requires_grad_() for t in (case.x, *case.parameters)]
    x, w1, b1, w2, b2 = leaves
    T = x.shape[1]
    keep = 1.0 if case.lengths is None else frame_mask(case.lengths, T).keep.double()
    a = rounded(torch.nn.functional.leaky_relu(x, residual.SLOPE))
    hidden = convolution(a, rounded(w1), b1, case.dilation) * keep
    a = rounded(hidden * torch.where(kept > 0, 1.0, residual.SLOPE).double())
    out = x + convolution(a, rounded(w2), b2, 1) * keep
    gradients = torch.autograd.grad(out, leaves, case.cotangent.double())
    return [out.detach(), *gradients]


def error(ours: Tensor, true: Tensor) -> float:
    """Root of the mean square, of that of the true values."""
    return float((ours.double() - true).norm() / true.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name in CASES
        for dtype in (BF16, F16)
        if (name, dtype) != ("most_channels_of_the_conformer", F16)  # half a minute to interpret
    ],
)
def test_against_the_definition(name, dtype, device):
    """At most twice the error of the plain form in the same dtype, and a trifle more."""
    case = CASES[name]().to(device, dtype)
    (found, kept), (by_plain, kept_by_plain) = results(case), results(case, Plain)
    expected = by_definition(case, kept), by_definition(case, kept_by_plain)
    for name, ours, plain, true, of_plain in zip(NAMES, found, by_plain, *expected):
        assert ours.dtype == plain.dtype == (dtype if name in ("output", "x") else F32), name
        assert ours.shape == plain.shape == true.shape, name
        assert ours.is_contiguous(), name
        wrong, allowed = error(ours, true), error(plain, of_plain)
        assert wrong <= 2 * allowed + torch.finfo(dtype).eps / 2, (name, wrong, allowed)


@pytest.mark.parametrize("name", ["fewer_frames_than_a_tap_reaches", "ragged", "more_channels"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_what_is_kept_tells_the_side_of_the_kink(name, dtype, device):
    """But for values that rounding may move across it."""
    case = CASES[name]().to(device, dtype)
    wide = case._replace(x=case.x.double(), parameters=tuple(p.double() for p in case.parameters))
    options = (case.lengths, case.dilation, True, False)
    kept = triton_residual.residual_unit(case.x, *case.parameters, *options)[1]
    hidden = residual.residual_unit_reference(wide.x, *wide.parameters, *options)[1]
    if case.lengths is not None:
        hidden *= frame_mask(case.lengths, hidden.shape[1]).keep
    far = hidden.abs() > 8 * torch.finfo(dtype).eps
    assert torch.equal(kept[far] > 0, hidden[far] > 0)
    assert (kept[hidden == 0] == 0).all()


@pytest.mark.parametrize("shape", [(1, 150, 64, 9), (1, 70, 128, 3)])
def test_sums_are_float32(shape, device):
    """Beside the definition with a's rounding, y is rounded once: half a unit of float16."""
    case = drawn(*shape).to(device, F16)
    (out, *_), kept = results(case)
    true = by_definition(case, kept, F16)[0]
    torch.testing.assert_close(out.double(), true, rtol=2**-10, atol=2**-11)


def test_padding_is_zero_where_convolutions_made_it(device):
    case = drawn(3, 90, 64, 3, (90, 40, 0)).to(device, BF16)
    out = triton_residual.residual_unit(
        case.x, *case.parameters, case.lengths, case.dilation, False, False
    )
    assert out[1].numel() == 0
    for row, length in enumerate((90, 40, 0)):
        assert (out[0][row, length:] == 0).all()


@pytest.mark.parametrize("shape", [(2, 100, 32, 5, (100, 77)), (1, 70, 128, 5, (66,))])
def test_same_input_same_bits(shape, device):
    case = drawn(*shape).to(device, BF16)
    for first, second in zip(results(case)[0], results(case)[0]):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(2, 130, 64, 5, (130, 77)), (3, 70, 128, 3, (66, 70, 0))])
def test_a_program_walks_over_several_tiles(shape, device, monkeypatch):
    """Of the tiles' sums only the order depends on the number of multiprocessors."""
    case = drawn(*shape).to(device, F16)
    many, _ = results(case)
    for module in (kernel, kernel_backward):
        monkeypatch.setattr(module, "processors", lambda x: 1)
    for name, few, first in zip(NAMES, results(case)[0], many):
        torch.testing.assert_close(few, first, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", kernel.SCHEDULES)
@pytest.mark.parametrize("lengths", [None, (130, 77)], ids=["whole", "ragged"])
def test_every_schedule_gives_the_same(lengths, name, device, monkeypatch):
    case = drawn(2, 130, 64, 5, lengths).to(device, F16)
    expected, _ = results(case)
    monkeypatch.setattr(kernel, "SCHEDULE", name)
    for name, ours, first in zip(NAMES, results(case)[0], expected):
        torch.testing.assert_close(ours, first, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16)])
def test_nothing(shape, device):
    case = drawn(*shape, 5).to(device, BF16)
    (out, d_x, *gradients), _ = results(case)
    assert out.shape == d_x.shape == shape
    assert all((gradient == 0).all() for gradient in gradients)


def test_lengths_elsewhere_are_refused():
    case = drawn(2, 9, 16, 1)
    lengths = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(InputError, match="lengths_frames: on meta, but x on cpu"):
        ops.residual_unit(case.x, *case.parameters, lengths_frames=lengths)


@pytest.mark.parametrize("change", ["float32", "float64", "channels"])
def test_the_plain_form_takes_what_the_kernels_do_not(change, monkeypatch):
    monkeypatch.delattr(kernel, "residual_unit")
    monkeypatch.delattr(kernel_backward, "residual_unit_backward")
    dtype = {"float32": F32, "float64": F64}.get(change, BF16)
    case = drawn(1, 30, 17 if change == "channels" else 16, 3).to("cpu", dtype)
    case = case._replace(parameters=tuple(p.to(dtype) for p in case.parameters))
    tolerance = 0.05 if dtype == BF16 else 1e-5
    found, kept = results(case)
    for ours, true in zip(found, by_definition(case, kept)):
        assert error(ours, true) < tolerance


@pytest.mark.parametrize("op", ["residual_unit", "residual_unit_backward"])
def test_it_is_the_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


def test_a_block_on_a_cpu_is_not_for_the_kernels():
    assert not triton_residual.takes_16_bits(torch.zeros(1, 5, 16, dtype=BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [64, 128])
def test_a_block_under_autocast_agrees_with_its_composition(C, monkeypatch):
    """Compiled, too; and the compiled graph holds the op."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(fused, "uses_unproven", True)
    torch.manual_seed(0)
    block = ResidualBlock(C, (1, 3, 25)).cuda()
    lengths = torch.tensor([200, 131, 1], device="cuda")
    mask = frame_mask(lengths, 200)
    x = (torch.randn(3, 200, C, device="cuda") * mask.keep).to(BF16).requires_grad_()
    grad = torch.randn(3, 200, C, device="cuda", dtype=BF16)
    leaves = (x, *block.parameters())

    def found(form: Callable) -> list[Tensor]:
        with torch.autocast("cuda", BF16):
            out = form(x, mask)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    with fused.composed():
        composed = found(block)
    ours, compiled = found(block), found(torch.compile(block, fullgraph=True))
    for first, second, third in zip(ours, composed, compiled, strict=True):
        assert first.dtype == second.dtype == third.dtype
        assert error(first, second.double()) < 0.03
        assert error(first, third.double()) < 1e-3
    with torch.autocast("cuda", BF16), torch.no_grad():
        torch.testing.assert_close(block(x, mask), ours[0].detach(), rtol=0, atol=0)
        program = torch.profiler.profile()
        with program:
            torch.compile(block, fullgraph=True)(x, mask)
    names = {event.name for event in program.events()}
    assert any("residual_unit" in name for name in names)


OPCHECK = """
import sys, torch
from gmm_jepa.ops import fused, residual, triton_residual
from bench.null_cuda.interpreter import mend_the_interpreter
from tests.kernels.opcheck import check
mend_the_interpreter()
device, fused.uses_unproven = sys.argv[1], True
if device == "cpu":
    residual._unit.register_kernel("cpu")(triton_residual.residual_unit)
    residual._unit_backward.register_kernel("cpu")(triton_residual.residual_unit_backward)
ops, C = torch.ops.gmm_jepa, 16
parameters = [torch.randn(s, device=device) for s in ((C, C, 3), C, (C, C, 3), C)]
lengths = torch.tensor([9, 4], device=device)
for x in (torch.randn(2, 9, C, device=device), torch.randn(2, C, 9, device=device).mT):
    x = x.bfloat16()
    arguments = (x, *parameters, lengths, 3)
    check(ops.residual_unit.default, (*arguments, False, False))
    out, hidden = ops.residual_unit(*arguments, True, False)
    check(ops.residual_unit_backward.default, (out, x, hidden, *arguments[1:], False))
    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    check(ops.residual_unit.default, (*leaves, lengths, 3, True, False))
"""


def test_opcheck_with_the_kernels_behind_the_op(device, tmp_path):
    """A process of its own: on a CPU the kernels take the place of the native ones."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", OPCHECK, device],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
