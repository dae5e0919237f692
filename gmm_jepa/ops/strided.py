"""Convolution of frame-major tensors with stride s and 2 s taps, its gradient as one product.

    y[b, t] = bias + sum_j W_j x[b, s t + j - s // 2],   j = 0 .. 2 s - 1,   zeros beyond the ends

Cut into blocks of s frames, frame t of y sees blocks t and t + 1, so block t of x gets a gradient
from frames t and t - 1 of y: both, side by side, times the taps. On an H200 cuDNN computes that
gradient of the default conformer's second stage, (32, 30,000, 64) bf16, stride 8, in 2.3 ms, four
kernels that copy to another layout and back; as one product it reads and writes 0.4 GB. On CPUs
the native module reads frames as rows of a product that overlap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.fused import allows_narrow, takes_float32
from gmm_jepa.ops.operator import Operator


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Convolve frame-major frames; differentiable in all three tensors.

    Under autocast all three are rounded to its dtype first, as for torch's convolutions. On a CPU
    the result is float32 then, and with native kernels x is not rounded but where it is multiplied.

    Args:
        x: (B, T, C) float.
        weight: (C', C, 2 stride), as in `torch.nn.Conv1d`.
        bias: (C',)
        stride: frames from one output to the next; padding is stride // 2.

    Returns:
        (B, (T + 2 (stride // 2)) // stride - 1, C'), dense.

    Raises:
        InputError: shapes do not fit, or T gives no frame.
    """
    if x.ndim != 3 or weight.ndim != 3 or weight.shape[1:] != (x.shape[-1], 2 * stride):
        found = f"{tuple(weight.shape)} for frames {tuple(x.shape)}"
        raise InputError(f"weight: expected (C', C, {2 * stride}) for (B, T, C), got {found}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias: expected ({len(weight)},), got {tuple(bias.shape)}")
    if x.shape[1] + 2 * (stride // 2) < 2 * stride:
        raise InputError(f"x: {x.shape[1]} frames give none with stride {stride}")
    kind = x.device.type
    if takes_float32(x):
        return _strided(x, weight, bias, stride, allows_narrow(x))
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _strided(x, weight, bias, stride, False)


def strided_forward(x: Tensor, weight: Tensor, bias: Tensor, stride: int, narrow: bool) -> Tensor:
    """`strided_conv` by torch's convolution, whose channels-last images frame-major memory is.

    In x's dtype: `narrow` allows to round what is multiplied, and does not ask for it.
    """
    with torch.autocast(x.device.type, enabled=False):
        images, filters = x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2)
        y = F.conv2d(images, filters, bias, stride=(1, stride), padding=(0, stride // 2))
    return y.squeeze(2).transpose(1, 2).contiguous()


def strided_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    with torch.autocast(x.device.type, enabled=False):
        _, d_weight, _ = torch.ops.aten.convolution_backward(
            grad.transpose(1, 2).unsqueeze(2),
            x.transpose(1, 2).unsqueeze(2),
            weight.unsqueeze(2),
            None,
            [1, stride],
            [0, stride // 2],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, False],
        )
        d_x = _gradient_of_frames(grad, weight, stride, n_frames=x.shape[1])
        return d_x, d_weight.reshape(weight.shape).contiguous(), grad.sum((0, 1))


def _gradient_of_frames(grad: Tensor, weight: Tensor, stride: int, *, n_frames: int) -> Tensor:
    (B, n, out), margin = grad.shape, stride // 2
    pairs = torch.cat([F.pad(grad, (0, 0, 0, 1)), F.pad(grad, (0, 0, 1, 0))], dim=2)
    taps = weight.permute(0, 2, 1).unflatten(1, (2, stride)).transpose(0, 1)  # (2, C', s, C)
    blocks = pairs.view(B * (n + 1), 2 * out) @ taps.reshape(2 * out, -1)
    frames = blocks.view(B, (n + 1) * stride, weight.shape[1])[:, margin : margin + n_frames]
    unseen = n_frames - frames.shape[1]  # frames behind the last tap
    return F.pad(frames, (0, 0, 0, unseen)) if unseen else frames.contiguous()


_strided = Operator("gmm_jepa::strided_conv", strided_forward)
_strided_backward = Operator("gmm_jepa::strided_conv_backward", strided_backward)


@_strided.register_fake
def _(x, weight, bias, stride, narrow):
    n_frames = (x.shape[1] + 2 * (stride // 2)) // stride - 1
    return x.new_empty(x.shape[0], n_frames, len(weight))


@_strided_backward.register_fake
def _(grad, x, weight, stride, narrow):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.narrow = inputs
    ctx.save_for_backward(x, weight)


def _vjp(ctx, grad):
    return *_strided_backward(grad, *ctx.saved_tensors, ctx.stride, ctx.narrow), None, None


_strided.register_autograd(_vjp, setup_context=_setup)

# On CUDA the ops take 16 bits as they are.
for _op in (_strided, _strided_backward):
    _op.register_autocast("cpu", torch.float32)
