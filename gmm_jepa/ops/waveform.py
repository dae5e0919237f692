"""Strided convolution of a waveform, one channel in: the first layer of a front end.

    y[b, t, c] = bias[c] + sum_k taps[c, k] x[b, t stride + k]

less the ends of a row: what a convolution composed of two has too much in the first and last frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.operator import Operator


def waveform_conv(
    x: Tensor, taps: Tensor, bias: Tensor, ends: Tensor, last: Tensor, *, stride: int
) -> Tensor:
    """Convolve without padding; differentiable in all floats. Not rounded by autocast on CPUs.

    Args:
        x: (B, S) float.
        taps: (C, K), K at most S.
        bias: (C,)
        ends: (B, 2, C), taken off frame 0 and frame `last`.
        last: (B,) int64, 0 to T - 1.
        stride: at least 1.

    Returns:
        (B, T, C) of x's dtype, T = (S - K) // stride + 1.

    Raises:
        InputError: shapes do not fit.
    """
    if x.ndim != 2 or taps.ndim != 2 or not 1 <= taps.shape[1] <= x.shape[1] or stride < 1:
        found = f"{tuple(x.shape)}, {tuple(taps.shape)}, stride {stride}"
        raise InputError(f"x, taps: expected (B, S) and (C, K), K at most S, got {found}")
    if bias.shape != taps.shape[:1]:
        raise InputError(f"bias: expected {tuple(taps.shape[:1])}, got {tuple(bias.shape)}")
    shape = (len(x), 2, len(taps))
    if ends.shape != shape or last.shape != x.shape[:1]:
        found = f"{tuple(ends.shape)} and {tuple(last.shape)}"
        raise InputError(f"ends, last: expected {shape} and {shape[:1]}, got {found}")
    return _waveform_conv(x, taps, bias, ends, last, stride)


def waveform_conv_reference(
    x: Tensor, taps: Tensor, bias: Tensor, ends: Tensor, last: Tensor, stride: int
) -> Tensor:
    """`waveform_conv` in plain torch."""
    return take_off(F.linear(x.unfold(1, taps.shape[1], stride), taps, bias), ends, last)


def take_off(frames: Tensor, ends: Tensor, last: Tensor) -> Tensor:
    """`frames` (B, T, C) less the ends (B, 2, C), in place."""
    rows = torch.arange(len(frames), device=frames.device)
    frames[:, 0] -= ends[:, 0]
    frames[rows, last] -= ends[:, 1]
    return frames


def of_ends(grad: Tensor, last: Tensor) -> Tensor:
    """Gradient of the ends."""
    rows = torch.arange(len(grad), device=grad.device)
    return -torch.stack([grad[:, 0], grad[rows, last]], dim=1)


def waveform_conv_backward_reference(
    grad: Tensor, x: Tensor, taps: Tensor, last: Tensor, stride: int, with_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, or (0,) without, of taps, bias and ends, in plain torch."""
    rows = grad.flatten(0, 1)
    d_x = x.new_empty(0)
    if with_x:
        d_x = x.new_zeros(x.shape)
        spread = F.conv_transpose1d(grad.mT, taps[:, None], stride=stride)[:, 0]
        d_x[:, : spread.shape[1]] = spread
    windows = x.unfold(1, taps.shape[1], stride).flatten(0, 1)
    return d_x, rows.T @ windows, rows.sum(0), of_ends(grad, last)


_waveform_conv = Operator("gmm_jepa::waveform_conv", waveform_conv_reference)
_waveform_conv_backward = Operator(
    "gmm_jepa::waveform_conv_backward", waveform_conv_backward_reference
)


@_waveform_conv.register_fake
def _(x, taps, bias, ends, last, stride):
    return x.new_empty((len(x), (x.shape[1] - taps.shape[1]) // stride + 1, len(taps)))


@_waveform_conv_backward.register_fake
def _(grad, x, taps, last, stride, with_x):
    d_x = x.new_empty(x.shape if with_x else 0)
    of_ends = x.new_empty((len(x), 2, len(taps)))
    return d_x, taps.new_empty(taps.shape), taps.new_empty(len(taps)), of_ends


def _setup(ctx, inputs, output):
    x, taps, _, _, last, ctx.stride = inputs
    ctx.save_for_backward(x, taps, last)


def _vjp(ctx, grad):
    with_x = ctx.needs_input_grad[0]
    d_x, *rest = _waveform_conv_backward(grad, *ctx.saved_tensors, ctx.stride, with_x)
    return d_x if with_x else None, *rest, None, None


_waveform_conv.register_autograd(_vjp, setup_context=_setup)

for _op in (_waveform_conv, _waveform_conv_backward):
    _op.register_autocast("cpu", torch.float32)
