"""Depthwise convolution over time of frame-major tensors, one filter a channel, length kept.

    y[b, t, c] = bias[c] + sum_k weight[c, k] x[b, t + k - K // 2, c],   zeros beyond a row's ends

The plain form is torch's own convolution, as two-dimensional and channels-last as in
`gmm_jepa.models.convolution`. On CUDA and on CPUs kernels take its place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import kind_of
from gmm_jepa.ops.operator import Operator


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own filter; differentiable in all three.

    Sums are float32 for bf16 and float16. Kernels take weight and bias as they are stored; plain
    torch on a GPU rounds them to x's dtype, as autocast does. Under autocast a float32 x is
    rounded to autocast's dtype first, as for torch's convolutions. Gradients have the dtype of
    what they are of.

    Args:
        x: (B, T, C) float, any strides.
        weight: (C, 1, K), as in `torch.nn.Conv1d`, or (C, K); K odd.
        bias: (C,) of weight's dtype; None: none.

    Returns:
        (B, T, C) of x's dtype, or of autocast's.

    Raises:
        InputError: shapes or devices make no sense.
        TypeError: a tensor is of the wrong type.
    """
    _check(x, weight, bias)
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return _depthwise(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(tensor)}")
        if tensor.device != x.device:
            raise InputError(f"{name}: on {tensor.device}, but x on {x.device}")
    if x.ndim != 3:
        raise InputError(f"x: expected (B, T, C), got {tuple(x.shape)}")
    C, K = x.shape[2], weight.shape[-1] if weight.ndim else 0
    if weight.shape not in ((C, 1, K), (C, K)) or K % 2 == 0:
        found = tuple(weight.shape)
        raise InputError(f"weight: expected ({C}, 1, K) or ({C}, K), K odd, got {found}")
    if bias is not None and bias.shape != (C,):
        raise InputError(f"bias: expected ({C},), got {tuple(bias.shape)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected weight's {weight.dtype}, got {bias.dtype}")


def _channels_last(x: Tensor) -> Tensor:
    """(B, T, C) as the images (B, C, 1, T) whose memory it is."""
    return x.transpose(1, 2).unsqueeze(2)


def _frame_major(images: Tensor) -> Tensor:
    """(B, C, 1, T) -> (B, T, C), dense."""
    return images.squeeze(2).transpose(1, 2).contiguous()


def _computed(x: Tensor) -> Tensor:
    """x in the dtype to compute with: on a CPU no 16-bit one.

    oneDNN (torch 2.11, a CPU that multiplies bfloat16) does not come back from 15 taps and more of
    16 channels in bf16.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x


def _filters(weight: Tensor, x: Tensor) -> Tensor:
    """(C, 1, 1, K) of x's dtype."""
    return weight.to(x.dtype).reshape(x.shape[2], 1, 1, -1)


def depthwise_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`depthwise_conv` in plain torch."""
    if not x.numel():
        return x.new_empty(x.shape)
    dtype, x, padding = x.dtype, _computed(x), (0, weight.shape[-1] // 2)
    with torch.autocast(x.device.type, enabled=False):
        filters, bias = _filters(weight, x), None if bias is None else bias.to(x.dtype)
        y = F.conv2d(_channels_last(x), filters, bias, padding=padding, groups=x.shape[2])
    return _frame_major(y).to(dtype)


def depthwise_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, or (0,) without one, in plain torch."""
    C, K = x.shape[2], weight.shape[-1]
    d_bias = weight.new_zeros(C if with_bias else 0)
    if not x.numel():
        return x.new_empty(x.shape), weight.new_zeros(weight.shape), d_bias
    dtype, grad, x = x.dtype, _computed(grad), _computed(x)
    with torch.autocast(x.device.type, enabled=False):
        d_x, d_filters, of_bias = torch.ops.aten.convolution_backward(
            _channels_last(grad),
            _channels_last(x),
            _filters(weight, x),
            [C],
            [1, 1],
            [0, K // 2],
            [1, 1],
            False,
            [0, 0],
            C,
            [True, True, with_bias],
        )
    d_weight = weight.new_empty(weight.shape).copy_(d_filters.reshape(weight.shape))
    return _frame_major(d_x).to(dtype), d_weight, d_bias.copy_(of_bias) if with_bias else d_bias


_depthwise = Operator("gmm_jepa::depthwise_conv", depthwise_reference)
_depthwise_backward = Operator("gmm_jepa::depthwise_conv_backward", depthwise_backward_reference)


@_depthwise.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@_depthwise_backward.register_fake
def _(grad, x, weight, with_bias):
    d_bias = weight.new_empty(x.shape[2] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias


def _setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.with_bias = bias is not None


def _vjp(ctx, grad):
    d_x, d_weight, d_bias = _depthwise_backward(grad, *ctx.saved_tensors, ctx.with_bias)
    return d_x, d_weight, d_bias if ctx.with_bias else None


_depthwise.register_autograd(_vjp, setup_context=_setup)
