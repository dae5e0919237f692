"""Kernels of the snake activation against float64: output and both gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gmm_jepa.kernels import snake as kernel
from torch import Tensor

from bench.null_cuda.interpreter import mend_the_interpreter
from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import fused, triton_front_end
from gmm_jepa.ops.snake import snake_backward_reference, snake_reference

from .strides import moved

mend_the_interpreter()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("output", "x", "a")


class Case(NamedTuple):
    """What the op takes, and the gradient that comes back to it."""

    x: Tensor  # (B, T, C)
    a: Tensor  # (C,)
    lengths: Tensor | None  # (B,)
    cotangent: Tensor  # (B, T, C)

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """a stays as it is, as under autocast; so do strides."""
        x, cotangent = (moved(t, device, dtype) for t in (self.x, self.cotangent))
        lengths = None if self.lengths is None else moved(self.lengths, device)
        return Case(x, self.a.to(device), lengths, cotangent)


def drawn(B: int, T: int, C: int, lengths: tuple[int, ...] | None = None, scale=1.0) -> Case:
    torch.manual_seed(B + T + C)
    x, cotangent = torch.randn(2, B, T, C)
    lengths = None if lengths is None else torch.tensor(lengths)
    return Case(scale * x, 0.1 + 3 * torch.rand(C), lengths, cotangent)


def _strided() -> Case:
    """x channels-first, the gradient every other channel of a wider one."""
    case = drawn(2, 70, 24, (70, 33))
    x = case.x.transpose(1, 2).contiguous().mT
    return case._replace(x=x, cotangent=torch.randn(2, 70, 48)[..., ::2])


CASES: dict[str, Callable[[], Case]] = {
    "a_block_of_channels": lambda: drawn(2, 300, 64, (300, 211)),
    "ragged": lambda: drawn(5, 270, 16, (0, 1, 31, 257, 270)),
    "one_frame": lambda: drawn(1, 1, 16),
    "primes": lambda: drawn(3, 101, 37, (101, 97, 13)),
    "five_channels": lambda: drawn(2, 60, 5, (60, 41)),
    "one_channel": lambda: drawn(1, 60, 1),
    "channels_beyond_a_block": lambda: drawn(1, 45, 70),
    "four_blocks_of_channels": lambda: drawn(1, 24, 256),
    "several_blocks_of_frames": lambda: drawn(1, 600, 16, (599,)),
    "quiet": lambda: drawn(2, 50, 16, scale=1e-3),
    "silent": lambda: drawn(2, 50, 16, scale=0.0),
    "loud": lambda: drawn(2, 90, 16, scale=300.0),
    "strided": _strided,
    "expanded_gradient": lambda: drawn(2, 90, 16)._replace(
        cotangent=torch.ones(()).expand(2, 90, 16)
    ),
}


def results(case: Case) -> list[Tensor]:
    out = triton_front_end.snake_narrow(*case[:3])
    return [out, *triton_front_end.snake_backward(case.cotangent, *case[:3])]


def by_plain_torch(case: Case, dtype: torch.dtype) -> list[Tensor]:
    x, a, cotangent = (t.to(dtype) for t in (case.x, case.a, case.cotangent))
    out = snake_reference(x, a, case.lengths)
    return [out, *snake_backward_reference(cotangent, x, a, case.lengths)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype, device):
    """At most twice the error of plain float32, a trifle more, and the rounding to x's dtype."""
    case = CASES[name]().to(device, dtype)
    # the interpreter cuts off where the hardware rounds
    ulps = 1.0 if device == "cpu" else 0.5
    for name, ours, plain, true in zip(
        NAMES, results(case), by_plain_torch(case, F32), by_plain_torch(case, torch.float64)
    ):
        assert ours.dtype == (F32 if name == "a" else dtype), name
        assert ours.shape == true.shape, name
        allowed = 2 * float((plain.double() - true).abs().max())
        allowed += 4 * torch.finfo(F32).eps * max(1.0, float(true.abs().max()))
        allowed += torch.finfo(ours.dtype).tiny  # below it float16 has fewer digits
        rounding = ulps * torch.finfo(ours.dtype).eps * true.abs() * (ours.dtype != F32)
        worst = float(((ours.double() - true).abs() - rounding).max())
        assert worst <= allowed, (name, worst, allowed)


def test_padding_is_zero(device):
    case = drawn(3, 70, 16, (70, 33, 0)).to(device, BF16)
    out, d_x, _ = results(case)
    for row, n in enumerate(case.lengths.tolist()):
        assert (out[row, n:] == 0).all()
        assert (d_x[row, n:] == 0).all()


@pytest.mark.gpu
def test_many_turns():
    """Fused multiplications keep the digits that plain float32 loses."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = drawn(2, 500, 64, scale=3e4).to("cuda", F32)
    for ours, true in zip(results(case), by_plain_torch(case, torch.float64)):
        assert float((ours - true).abs().max()) <= 4e-6 * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e12, 1e30])
def test_beyond_the_farthest_turn(scale, device):
    """No digit of the sine is left in y, and none of the product in the sine's argument."""
    case = drawn(2, 60, 64, scale=scale).to(device, F32)
    far = case.a * case.x.abs() > 2**23
    assert far.float().mean() > 0.5
    out, d_x, d_a = results(case)
    assert torch.equal(out[far], case.x[far])
    assert torch.equal(d_x[far], case.cotangent[far])
    bound = (case.cotangent * case.x).abs().double().sum((0, 1)) / case.a
    assert (d_a.abs() <= bound).all()


def test_what_is_not_finite_shows(device):
    case = drawn(1, 40, 16).to(device, F32)
    case.x[0, 3, 3], case.x[0, 1, 5] = torch.nan, torch.inf
    out, d_x, _ = results(case)
    assert torch.equal(~out.isfinite(), ~case.x.isfinite())
    assert torch.equal(d_x.isnan(), ~case.x.isfinite())


def test_same_input_same_bits(device):
    case = drawn(2, 300, 70, (300, 191)).to(device, BF16)
    for first, second in zip(results(case), results(case)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16), (2, 9, 0)])
def test_nothing(shape, device):
    out, d_x, d_a = results(drawn(*shape).to(device, F32))
    assert out.shape == d_x.shape == shape
    assert (d_a == 0).all()


def test_lengths_elsewhere_are_refused():
    x, lengths = torch.zeros(2, 5, 16), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(InputError, match="lengths_frames: on meta, but x on cpu"):
        ops.snake(x, torch.ones(16), lengths_frames=lengths)


def test_the_plain_form_takes_float64(monkeypatch):
    for name in ("snake", "snake_backward"):
        monkeypatch.delattr(kernel, name)
    case = drawn(2, 40, 5, (40, 11))
    case = Case(case.x.double(), case.a.double(), case.lengths, case.cotangent.double())
    for ours, true in zip(results(case), by_plain_torch(case, torch.float64)):
        assert torch.equal(ours, true)


@pytest.mark.parametrize("op", ["snake_narrow", "snake_backward"])
def test_it_is_the_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


@pytest.mark.gpu
def test_a_compiled_step_under_autocast_holds_the_kernels(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(fused, "uses_unproven", True)
    from gmm_jepa.models.frontend import Snake
    from gmm_jepa.models.padding import frame_mask

    module = Snake(64).cuda()
    mask = frame_mask(torch.tensor([700, 350], device="cuda"), 700)
    x = torch.randn(2, 700, 64, device="cuda", dtype=BF16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = []
        for form in (module, torch.compile(module, fullgraph=True)):
            with torch.autocast("cuda", BF16):
                out = form(x, mask)
            gradients = torch.autograd.grad(out, (x, module.alpha), torch.ones_like(out))
            found.append([out, *gradients])
    assert [t.dtype for t in found[0]] == [BF16, BF16, F32]
    for compiled, eager in zip(found[1], found[0], strict=True):
        # a may differ in its last bit, and then a rounding to bf16 falls otherwise
        rtol = 2**-7 if eager.dtype == BF16 else 1e-3
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=1e-3)
    ran = {event.key for event in profile.key_averages()}
    assert {"_snake_fwd_kernel", "_snake_bwd_kernel"} <= ran


OPCHECK = """
import sys, torch
from gmm_jepa.ops import fused, triton_front_end
from gmm_jepa.ops.snake import _snake_backward, _snake_narrow
from bench.null_cuda.interpreter import mend_the_interpreter
from tests.kernels.opcheck import check
mend_the_interpreter()
device, fused.uses_unproven = sys.argv[1], True
if device == "cpu":
    _snake_narrow.register_kernel("cpu")(triton_front_end.snake_narrow)
    _snake_backward.register_kernel("cpu")(triton_front_end.snake_backward)
a = torch.rand(6, device=device).add_(0.1).requires_grad_()
lengths = torch.tensor([9, 4], device=device)
ops = torch.ops.gmm_jepa
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(2, 9, 6, device=device, dtype=dtype, requires_grad=True)
    check(ops.snake_narrow.default, (x, a, lengths))
    check(ops.snake_narrow.default, (x, a, None))
    check(ops.snake_backward.default, (x.detach(), x.detach(), a.detach(), lengths))
x = torch.randn(2, 6, 9, device=device).mT
check(ops.snake_narrow.default, (x.requires_grad_(), a, lengths))
check(ops.snake_backward.default, (x.detach(), x.detach(), a.detach(), lengths))
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
