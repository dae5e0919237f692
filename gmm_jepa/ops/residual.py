"""One unit of a residual block of convolutions, x + keep conv(lrelu(keep conv(lrelu(x)))).

The first convolution is dilated; both have three taps and as many channels out as in, and keep the
number of frames. On a CPU one op reads x once and writes the result once, with everything between
in cache; on CUDA two kernels, where they are asked for (`fused.uses_unproven`), take the place of
two convolutions and six passes between. For the gradient it keeps what the first convolution made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_sequence, check_shapes
from gmm_jepa.ops.fused import takes_float32
from gmm_jepa.ops.lengths import check_lengths, real_frames
from gmm_jepa.ops.operator import Operator

SLOPE = 0.1
MOST_DILATION = 2**31
"""Sums of some are far from what 64 bits hold."""
"""Of the leaky ReLU."""


def residual_unit(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    dilation: int = 1,
    lengths_frames: Tensor | None = None,
) -> Tensor:
    """x + conv2(lrelu(conv1(lrelu(x)))), with zeros for what a convolution makes of padding.

    On a CPU under autocast to bfloat16 x is taken as float32 and stays so; what is multiplied is
    rounded to bfloat16, on the way back too, where the processor has products of it. On CUDA x
    keeps its dtype, and one of 16 bits is multiplied as it is, with weights rounded to it.

    Args:
        x: (B, T, C) float; frames beyond a row's length are zero.
        weight1: (C, C, 3), as in `torch.nn.Conv1d`, of the dilated convolution.
        bias1: (C,)
        weight2: (C, C, 3), of the plain one.
        bias2: (C,)
        dilation: frames between two taps of the first.
        lengths_frames: (B,) int64, real frames of each row; None: all.

    Returns:
        (B, T, C) of x's dtype, or float32 as said.

    Raises:
        InputError: shapes, devices or dilation make no sense.
    """
    parameters = (weight1, bias1, weight2, bias2)
    check_sequence(x)
    C = x.shape[2]
    names = ("weight1", "bias1", "weight2", "bias2")
    check_shapes(x, names, parameters, ((C, C, 3), (C,)) * 2)
    if not 1 <= dilation <= MOST_DILATION:
        raise InputError(f"dilation: expected 1 to 2^31, got {dilation}")
    check_lengths(lengths_frames, x)
    narrow = takes_float32(x) and torch.is_autocast_enabled("cpu")
    wanted = any(tensor.requires_grad for tensor in (x, *parameters))
    keep_hidden = torch.is_grad_enabled() and wanted
    return _unit(x, *parameters, lengths_frames, dilation, keep_hidden, narrow)[0]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=dilation, dilation=dilation)
    return y.transpose(1, 2)


def residual_unit_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
    keep_hidden: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """`residual_unit` in plain torch, and what the first convolution made, or (0,) without.

    It is in x's dtype: `narrow` allows to round what is multiplied, and does not ask for it. What
    is kept is for the backward of the same device alone: another kernel may keep it differently.
    """
    if not x.numel():
        return x.clone(), x.new_empty(x.shape if keep_hidden else (0,))
    real = 1.0 if lengths_frames is None else real_frames(lengths_frames, x)
    with torch.autocast(x.device.type, enabled=False):
        hidden = _convolution(F.leaky_relu(x, SLOPE), weight1, bias1, dilation)
        y = _convolution(F.leaky_relu(hidden * real, SLOPE), weight2, bias2, 1)
    kept = hidden.contiguous() if keep_hidden else x.new_empty(0)
    return (x + y * real).contiguous(), kept


def residual_unit_backward_reference(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2, in plain torch."""

    def through(inner: Tensor, weight: Tensor, gradient: Tensor, dilation: int):
        """Gradients of lrelu(inner), the weight and the bias of one convolution."""
        a = F.leaky_relu(inner, SLOPE).transpose(1, 2)
        d_a, d_weight, d_bias = torch.ops.aten.convolution_backward(
            gradient.transpose(1, 2),
            a,
            weight.to(a.dtype),
            [weight.shape[0]],
            [1],
            [dilation],
            [dilation],
            False,
            [0],
            1,
            [True, True, True],
        )
        # Channels last on some devices, which the op's description does not promise.
        d_weight = d_weight.to(weight.dtype).contiguous()
        return d_a.transpose(1, 2), d_weight, d_bias.to(weight.dtype)

    if not x.numel():
        return tuple(t.new_zeros(t.shape) for t in (x, weight1, bias1, weight2, bias2))
    real = 1.0 if lengths_frames is None else real_frames(lengths_frames, x)
    inner = hidden * real
    with torch.autocast(x.device.type, enabled=False):
        d_a2, d_weight2, d_bias2 = through(inner, weight2, grad * real, 1)
        d_hidden = torch.where(inner > 0, d_a2, SLOPE * d_a2) * real
        d_a1, d_weight1, d_bias1 = through(x, weight1, d_hidden, dilation)
    d_x = grad + torch.where(x > 0, d_a1, SLOPE * d_a1)
    return d_x.contiguous(), d_weight1, d_bias1, d_weight2, d_bias2


_unit = Operator("gmm_jepa::residual_unit", residual_unit_reference)
_unit_backward = Operator("gmm_jepa::residual_unit_backward", residual_unit_backward_reference)


@_unit.register_fake
def _(x, weight1, bias1, weight2, bias2, lengths_frames, dilation, keep_hidden, narrow):
    out = x.new_empty(x.shape)
    return out, x.new_empty(x.shape) if keep_hidden else x.new_empty(0)


@_unit_backward.register_fake
def _(grad, x, hidden, weight1, bias1, weight2, bias2, lengths_frames, dilation, narrow):
    return tuple(t.new_empty(t.shape) for t in (x, weight1, bias1, weight2, bias2))


def _setup(ctx, inputs, output):
    x, *parameters, lengths_frames, dilation, _, narrow = inputs
    ctx.save_for_backward(x, output[1], *parameters, lengths_frames)
    ctx.dilation, ctx.narrow = dilation, narrow
    ctx.set_materialize_grads(False)  # zeros as large as the hidden values


def _vjp(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    gradients = _unit_backward(grad, *ctx.saved_tensors, ctx.dilation, ctx.narrow)
    return *gradients, None, None, None, None


_unit.register_autograd(_vjp, setup_context=_setup)

# On CUDA the ops take 16 bits as they are.
for _op in (_unit, _unit_backward):
    _op.register_autocast("cpu", torch.float32)
