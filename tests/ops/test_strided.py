"""Strided convolution whose gradient is one product: against torch's own, compiled, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError

SIZES = {  # B, T, C, C', stride
    "second_stage": (2, 400, 16, 24, 8),
    "odd_stride": (3, 103, 5, 7, 5),
    "frames_behind_the_last_tap": (2, 47, 8, 8, 8),
    "fewest_frames": (1, 8, 4, 6, 8),
    "stride_2": (2, 31, 3, 4, 2),
    "no_rows": (0, 40, 4, 6, 8),
}


def drawn(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], int]:
    B, T, C, C_out, stride = SIZES[name]
    torch.manual_seed(B + T)
    x, weight = torch.randn(B, T, C, dtype=dtype), torch.randn(C_out, C, 2 * stride, dtype=dtype)
    leaves = [x, weight / (2 * stride) ** 0.5, torch.randn(C_out, dtype=dtype)]
    return [leaf.requires_grad_() for leaf in leaves], stride


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, stride=stride, padding=stride // 2)
    return y.transpose(1, 2)


def with_gradients(form, leaves: list[Tensor], stride: int) -> list[Tensor]:
    out = form(*leaves, stride)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("name", SIZES)
def test_torchs_own_convolution(name):
    leaves, stride = drawn(name)
    ours = with_gradients(ops.strided_conv, leaves, stride)
    for a, b in zip(ours, with_gradients(torch_conv, leaves, stride), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_strided_frames_and_an_expanded_gradient():
    (x, weight, bias), stride = drawn("odd_stride")
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gradients = [
        torch.autograd.grad(form(leaf, weight, bias, stride).sum(), leaf)[0]
        for form, leaf in ((ops.strided_conv, turned), (torch_conv, x))
    ]
    torch.testing.assert_close(*gradients)


def test_autocast_rounds_what_comes_in():
    leaves, stride = drawn("second_stage", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = with_gradients(ops.strided_conv, leaves, stride)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)
    wide = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    for a, b in zip([out, *gradients], with_gradients(ops.strided_conv, wide, stride)):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("name", ["second_stage", "odd_stride"])
def test_as_an_op(name):
    leaves, stride = drawn(name)
    torch.library.opcheck(torch.ops.gmm_jepa.strided_conv.default, (*leaves, stride))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 40, 4), (6, 4, 15), (6,)), "weight: expected"),
        (((2, 40, 4), (6, 5, 16), (6,)), "weight: expected"),
        (((2, 40, 4), (6, 4, 16), (5,)), "bias: expected"),
        (((2, 7, 4), (6, 4, 16), (6,)), "give none"),
    ],
)
def test_refusals(shapes, words):
    with pytest.raises(InputError, match=words):
        ops.strided_conv(*(torch.zeros(shape) for shape in shapes), 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_on_a_gpu():
    leaves, stride = drawn("second_stage")
    rounded = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    narrow = [leaf.detach().to("cuda", torch.bfloat16).requires_grad_() for leaf in leaves]
    expected = with_gradients(ops.strided_conv, rounded, stride)
    out = ops.strided_conv(*narrow, stride)
    cotangent = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    gradients = torch.autograd.grad(out, narrow, cotangent.to(out))
    for a, b in zip((out, *gradients), expected, strict=True):
        assert (a.double().cpu() - b).norm() < 0.01 * b.norm()
