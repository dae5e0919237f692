"""A conformer's convolution module with its residual: norm, maps, GLU and taps in one op on CPUs.

    x + drop(W_d silu(norm(taps(glu(W_u norm(x))))))

The norms are of one group over a row's real frames and all channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_probability, check_sequence, check_shapes
from gmm_jepa.ops.depthwise import depthwise_backward_reference, depthwise_reference
from gmm_jepa.ops.dropout import drawn_seed, dropout_reference
from gmm_jepa.ops.fused import allows_narrow
from gmm_jepa.ops.lengths import check_lengths, real_frames
from gmm_jepa.ops.operator import Operator


class ConvolutionWeights(NamedTuple):
    """Parameters of a convolution module."""

    norm_in: Tensor
    """(D,)"""
    norm_in_bias: Tensor
    """(D,)"""
    up: Tensor
    """(2 D, D): values, then gates."""
    up_bias: Tensor
    """(2 D,)"""
    taps: Tensor
    """(D, 1, K), K odd, as in `torch.nn.Conv1d`."""
    taps_bias: Tensor
    """(D,)"""
    norm_out: Tensor
    """(D,)"""
    norm_out_bias: Tensor
    """(D,)"""
    down: Tensor
    """(D, D)"""
    down_bias: Tensor
    """(D,)"""


def convolution_module(
    x: Tensor,
    weights: ConvolutionWeights,
    *,
    epsilon: float = 1e-5,
    lengths_frames: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x + drop(down(silu(norm(taps(glu(up(norm(x)))))))), differentiable in x and weights.

    Frames beyond a row's length are not seen, and come out as they are. On a CPU under autocast to
    bfloat16 x is taken as float32 and stays so; what the maps multiply is rounded to bfloat16, on
    the way back too, where the processor has products of it.

    Args:
        x: (B, T, D) float, T at least 1, of the weights' dtype but under autocast on CPUs.
        weights: of the norms, the maps and the taps.
        epsilon: added to the variances.
        lengths_frames: (B,) int64, real frames of each row; None: all.
        dropout_p: of the dropout, at least 0 and below 1, drawn from torch's own generator.

    Returns:
        (B, T, D) of x's dtype.

    Raises:
        InputError: shapes do not fit, or dropout_p is out of its range.
    """
    check_probability("dropout_p", dropout_p)
    check_sequence(x, fewest_frames=1)
    check_lengths(lengths_frames, x)
    if weights.taps.shape[-1] % 2 == 0:
        raise InputError(f"taps: expected an odd number, got {weights.taps.shape[-1]}")
    shapes = convolution_module_shapes(x, weights.taps)
    check_shapes(x, weights._fields, weights, shapes)
    narrow = allows_narrow(x)
    seed = drawn_seed(dropout_p)
    return _convolution_module(x, *weights, lengths_frames, seed, epsilon, dropout_p, narrow)[0]


def convolution_module_shapes(x: Tensor, taps: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of the weights for x (B, T, D) and taps (D, 1, K)."""
    _, _, D = x.shape
    d = (D,)
    return d, d, (2 * D, D), (2 * D,), (D, 1, taps.shape[-1]), d, d, d, (D, D), d


def _normal(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(x - mean) scale of the rows of (B, T, D), with (B,) each."""
    return (x - mean[:, None, None]) * scale[:, None, None]


def _statistics(x: Tensor, real: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (B,) over the real frames and all channels."""
    count = (real.sum((1, 2)) * x.shape[2]).clamp(min=1)
    mean = (x * real).sum((1, 2)) / count
    centred = (x - mean[:, None, None]) * real
    return mean, (centred.square().sum((1, 2)) / count + epsilon).rsqrt()


def _through_norm(grad: Tensor, normal: Tensor, scale: Tensor, real: Tensor) -> Tensor:
    """Gradient of x from that of its `_normal`, which is zero on padding."""
    count = (real.sum((1, 2)) * grad.shape[2]).clamp(min=1)[:, None, None]
    mean = grad.sum((1, 2), keepdim=True) / count
    along = (grad * normal).sum((1, 2), keepdim=True) / count
    return scale[:, None, None] * (grad - mean - normal * along) * real


def _seen(x: Tensor, real: Tensor) -> Tensor:
    """x with zeros on padding, whatever is there."""
    return torch.where(real > 0, x, 0.0)


def _real(lengths_frames: Tensor | None, x: Tensor) -> Tensor:
    """(B, T, 1): one on real frames, zero on padding."""
    return (
        x.new_ones((*x.shape[:2], 1)) if lengths_frames is None else real_frames(lengths_frames, x)
    )


def convolution_module_reference(
    x: Tensor,
    norm_in: Tensor,
    norm_in_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    norm_out: Tensor,
    norm_out_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    lengths_frames: Tensor | None,
    seed: Tensor | None,
    epsilon: float,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`convolution_module` in plain torch, and what its gradient needs.

    In x's dtype: `narrow` allows to round what is multiplied, and does not ask for it.

    Returns:
        (B, T, D), the result; (B, T, 2 D), what `up` made, bfloat16 if `narrow`; (B, T, D), what
        the taps made; (B, 4), mean and inverse deviation before `up`, and behind the taps.
    """
    real = _real(lengths_frames, x)
    with torch.autocast(x.device.type, enabled=False):
        seen = _seen(x, real)
        mean_in, scale_in = _statistics(seen, real, epsilon)
        made = F.linear(_normal(seen, mean_in, scale_in) * norm_in + norm_in_bias, up, up_bias)
        convolved = depthwise_reference(F.glu(made, dim=-1) * real, taps, taps_bias)
        mean_out, scale_out = _statistics(convolved, real, epsilon)
        value = F.silu(_normal(convolved, mean_out, scale_out) * norm_out + norm_out_bias)
        dropped = dropout_reference(F.linear(value, down, down_bias), seed, dropout_p)
        out = (x + dropped * real).contiguous()
    made = made.to(torch.bfloat16 if narrow else x.dtype)
    return out, made, convolved, torch.stack([mean_in, scale_in, mean_out, scale_out], dim=1)


def convolution_module_backward_reference(
    grad: Tensor,
    x: Tensor,
    made: Tensor,
    convolved: Tensor,
    statistics: Tensor,
    norm_in: Tensor,
    norm_in_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    norm_out: Tensor,
    norm_out_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    lengths_frames: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the weights, in plain torch."""
    real, made = _real(lengths_frames, x), made.to(x.dtype)
    mean_in, scale_in, mean_out, scale_out = statistics.unbind(dim=1)
    with torch.autocast(x.device.type, enabled=False):
        of_output = dropout_reference(_seen(grad, real), seed, dropout_p)
        normal = _normal(convolved, mean_out, scale_out)
        before = normal * norm_out + norm_out_bias
        of_before = torch.ops.aten.silu_backward(of_output @ down, before)
        of_convolved = _through_norm(of_before * norm_out, normal, scale_out, real)
        gated = F.glu(made, dim=-1) * real
        of_gated, d_taps, d_taps_bias = depthwise_backward_reference(
            of_convolved, gated, taps, True
        )
        of_made = torch.ops.aten.glu_backward(of_gated * real, made, -1)
        normal_in = _normal(_seen(x, real), mean_in, scale_in)
        of_inputs = of_made @ up
        d_x = grad + _through_norm(of_inputs * norm_in, normal_in, scale_in, real)
        inputs = normal_in * norm_in + norm_in_bias
        return (
            d_x.contiguous(),
            (of_inputs * normal_in).sum((0, 1)),
            of_inputs.sum((0, 1)),
            of_made.flatten(0, 1).T @ inputs.flatten(0, 1),
            of_made.sum((0, 1)),
            d_taps.contiguous(),
            d_taps_bias,
            (of_before * normal).sum((0, 1)),
            of_before.sum((0, 1)),
            of_output.flatten(0, 1).T @ F.silu(before).flatten(0, 1),
            of_output.sum((0, 1)),
        )


_convolution_module = Operator("gmm_jepa::convolution_module", convolution_module_reference)
_convolution_module_backward = Operator(
    "gmm_jepa::convolution_module_backward", convolution_module_backward_reference
)


@_convolution_module.register_fake
def _(x, *weights_and_options):
    (B, T, D), narrow = x.shape, weights_and_options[-1]
    made = x.new_empty((B, T, 2 * D), dtype=torch.bfloat16 if narrow else x.dtype)
    return x.new_empty((B, T, D)), made, x.new_empty((B, T, D)), x.new_empty((B, 4))


@_convolution_module_backward.register_fake
def _(grad, x, made, convolved, statistics, *weights_and_options):
    return tuple(t.new_empty(t.shape) for t in (x, *weights_and_options[:10]))


def _setup(ctx, inputs, output):
    x, *tensors, _, ctx.dropout_p, ctx.narrow = inputs
    ctx.save_for_backward(x, *output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, *_):
    if grad is None:
        return (None,) * 16
    gradients = _convolution_module_backward(grad, *ctx.saved_tensors, ctx.dropout_p, ctx.narrow)
    return *gradients, None, None, None, None, None


_convolution_module.register_autograd(_vjp, setup_context=_setup)

for _op in (_convolution_module, _convolution_module_backward):
    _op.register_autocast("cpu", torch.float32)
