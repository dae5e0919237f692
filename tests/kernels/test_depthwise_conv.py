"""Kernels of the depthwise convolution against float64: output and all three gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gmm_jepa.kernels import depthwise_conv as kernel
from torch import Tensor

from bench.null_cuda.interpreter import mend_the_interpreter
from gmm_jepa.ops import depthwise, triton_depthwise

from .strides import moved

mend_the_interpreter()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("output", "x", "weight", "bias")


class Case(NamedTuple):
    """What the op takes, and the gradient that comes back to it."""

    x: Tensor  # (B, T, C)
    weight: Tensor  # (C, 1, K)
    bias: Tensor | None  # (C,)
    cotangent: Tensor  # (B, T, C)

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """Weight and bias stay as they are, as under autocast; so do strides."""
        x, cotangent = (moved(t, device, dtype) for t in (self.x, self.cotangent))
        bias = None if self.bias is None else self.bias.to(device)
        return Case(x, self.weight.to(device), bias, cotangent)


def drawn(B: int, T: int, C: int, K: int) -> Case:
    torch.manual_seed(B + T + C + K)
    x, cotangent = torch.randn(2, B, T, C)
    return Case(x, torch.randn(C, 1, K) / K**0.5, torch.randn(C), cotangent)


def _strided() -> Case:
    """x channels-first, the gradient every other channel of a wider one."""
    case = drawn(2, 70, 24, 5)
    wide = torch.randn(2, 70, 48)
    return case._replace(x=torch.randn(2, 24, 70).mT, cotangent=wide[..., ::2])


def _expanded() -> Case:
    """The gradient of a sum is one value, everywhere."""
    case = drawn(3, 40, 70, 3)
    return case._replace(cotangent=torch.ones(()).expand_as(case.x))


def _silent_rows() -> Case:
    """Log-mel's range under a large offset, zeros behind a row's own frames."""
    case = drawn(3, 90, 20, 31)
    keep = (torch.arange(90) < torch.tensor([90, 40, 0])[:, None])[..., None]
    return case._replace(x=(10.0 * case.x - 13.8) * keep)


CASES: dict[str, Callable[[], Case]] = {
    "as_in_the_conformer": lambda: drawn(2, 100, 64, 31),
    "one_frame": lambda: drawn(2, 1, 24, 31),
    "two_frames": lambda: drawn(1, 2, 16, 3),
    "fewer_frames_than_taps": lambda: drawn(2, 17, 40, 31),
    "primes": lambda: drawn(3, 131, 37, 7),
    "more_than_a_chunk": lambda: drawn(1, 299, 32, 31),
    "channels_beyond_a_block": lambda: drawn(1, 66, 130, 9),
    "one_channel": lambda: drawn(2, 70, 1, 5),
    "one_tap": lambda: drawn(2, 65, 32, 1),
    "three_taps": lambda: drawn(2, 129, 64, 3),
    "no_bias": lambda: drawn(2, 50, 48, 15)._replace(bias=None),
    "strided": _strided,
    "expanded_gradient": _expanded,
    "offset_and_silence": _silent_rows,
}


def results(case: Case, form=triton_depthwise) -> list[Tensor]:
    forward, backward = form.depthwise_conv, form.depthwise_conv_backward
    out = forward(case.x, case.weight, case.bias)
    gradients = backward(case.cotangent, case.x, case.weight, case.bias is not None)
    return [out, *gradients]


class Plain:
    """The form that the op is defined by."""

    depthwise_conv = staticmethod(depthwise.depthwise_reference)
    depthwise_conv_backward = staticmethod(depthwise.depthwise_backward_reference)


def by_definition(case: Case) -> list[Tensor]:
    """Output and gradients, float64, a tap at a time."""
    bias = torch.zeros(len(case.weight), device=case.x.device) if case.bias is None else case.bias
    leaves = [t.detach().double().requires_grad_() for t in (case.x, case.weight, bias)]
    x, weight, bias = leaves
    T, K = x.shape[1], weight.shape[-1]
    padded = torch.nn.functional.pad(x, (0, 0, K // 2, K // 2))
    out = bias + sum(weight[:, 0, k] * padded[:, k : k + T] for k in range(K))
    gradients = torch.autograd.grad(out, leaves, case.cotangent.double())
    return [out.detach(), *gradients[: 2 if case.bias is None else 3]]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype, device):
    """At most twice the error of the plain form in the same dtype, and a trifle more."""
    case = CASES[name]().to(device, dtype)
    for name, ours, plain, true in zip(
        NAMES, results(case), results(case, Plain), by_definition(case)
    ):
        assert ours.dtype == plain.dtype == (dtype if name in ("output", "x") else F32), name
        assert ours.shape == plain.shape == true.shape, name
        error, allowed = (float((t.double() - true).abs().max()) for t in (ours, plain))
        trifle = torch.finfo(ours.dtype).eps * max(1.0, float(true.abs().max()))
        assert error <= 2 * allowed + trifle, (name, error, allowed, trifle)


@pytest.mark.parametrize("case", [(2, 150, 64, 31), (1, 140, 16, 63)])
def test_float32_sums_of_bfloat16(case, device):
    """Weights are not rounded, sums not either: y is a bf16 beside its value.

    Beside, not nearest: the interpreter cuts off. The most taps are here, because
    oneDNN (torch 2.11) does not come back from 15 and more in bf16 at 16 channels.
    """
    case = drawn(*case).to(device, BF16)
    out, d_x, d_weight, d_bias = results(case)
    true = by_definition(case)
    for ours, exact in zip((out, d_x), true):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=1e-5)
    for ours, exact in zip((d_weight, d_bias), true[2:]):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_weights_of_two_axes_and_of_half_a_width(device):
    case = drawn(2, 40, 64, 7).to(device, BF16)
    case = case._replace(weight=case.weight.to(BF16), bias=case.bias.to(BF16))
    flat = case._replace(weight=case.weight[:, 0])
    for three, two in zip(results(case), results(flat)):
        assert three.dtype == two.dtype == BF16
        assert torch.equal(three.flatten(), two.flatten())
    assert results(flat)[2].shape == (64, 7)


def test_same_input_same_bits(device):
    case = drawn(2, 140, 70, 9).to(device, BF16)
    for first, second in zip(results(case), results(case)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16)])
def test_nothing(shape, device):
    case = drawn(*shape, 5).to(device, F32)
    out, d_x, d_weight, d_bias = results(case)
    assert out.shape == d_x.shape == shape
    assert (d_weight == 0).all()
    assert (d_bias == 0).all()


@pytest.mark.parametrize("change", ["float64", "many_taps"])
def test_the_plain_form_takes_what_the_kernels_do_not(change, monkeypatch):
    for name in ("depthwise_conv", "depthwise_conv_backward"):
        monkeypatch.delattr(kernel, name)
    case = drawn(1, 70, 4, 65 if change == "many_taps" else 3)
    if change == "float64":
        case = Case(*(t.double() for t in case))
    for ours, true in zip(results(case), by_definition(case)):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["depthwise_conv", "depthwise_conv_backward"])
def test_it_is_the_kernel_on_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


@pytest.mark.gpu
def test_a_compiled_step_under_autocast_holds_the_kernels():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from gmm_jepa.models.convolution import DepthwiseConv

    module = DepthwiseConv(64, 31).cuda()
    x = torch.randn(2, 200, 64, device="cuda", requires_grad=True)
    found = []
    for form in (module, torch.compile(module, fullgraph=True)):
        with torch.autocast("cuda", BF16):
            out = form(x)
        leaves = (x, module.weight, module.bias)
        found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert found[0][0].dtype == BF16
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


OPCHECK = """
import sys, torch
from gmm_jepa.ops import depthwise, triton_depthwise
from bench.null_cuda.interpreter import mend_the_interpreter
from tests.kernels.opcheck import check
mend_the_interpreter()
device = sys.argv[1]
if device == "cpu":
    depthwise._depthwise.register_kernel("cpu")(triton_depthwise.depthwise_conv)
    backward = triton_depthwise.depthwise_conv_backward
    depthwise._depthwise_backward.register_kernel("cpu")(backward)
bias = torch.randn(6, device=device, requires_grad=True)
ops = torch.ops.gmm_jepa
for shape in ((6, 1, 5), (6, 5)):
    weight = torch.randn(shape, device=device, requires_grad=True)
    for x in (torch.randn(2, 9, 6, device=device), torch.randn(2, 6, 9, device=device).mT):
        check(ops.depthwise_conv.default, (x.requires_grad_(), weight, bias))
        check(ops.depthwise_conv.default, (x, weight, None))
        check(ops.depthwise_conv_backward.default, (x.detach(), x.detach(), weight.detach(), True))
"""


def test_opcheck_with_the_kernels_behind_the_op(device, tmp_path):
    """A process of its own: on a CPU the kernels take the place of the plain ones."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [sys.executable, "-c", OPCHECK, device],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
