"""Several residual units in a row, each x + keep conv(lrelu(keep conv(lrelu(x)))).

On a CPU with few channels one op takes a block of frames through all of them, and for the gradient
keeps nothing but x; see `gmm_jepa.ops.residual` for one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_sequence, check_shapes
from gmm_jepa.ops.fused import allows_narrow, takes_float32
from gmm_jepa.ops.lengths import check_lengths
from gmm_jepa.ops.operator import Operator
from gmm_jepa.ops.residual import (
    MOST_DILATION,
    residual_unit_backward_reference,
    residual_unit_reference,
)

CHANNELS = (16, 32)
"""That are worth it: with more, products outweigh the passes between them."""


def takes_residual_block(x: Tensor, dilations: Sequence[int]) -> bool:
    """Whether `residual_block` is the way to go for units of these dilations on x (B, T, C)."""
    if not (takes_float32(x) and x.shape[2] in CHANNELS and x.shape[1] > 0):
        return False
    # Frames around a block that it computes once more: few beside its own.
    return 32 * x.shape[2] * sum(d + 1 for d in dilations) <= BLOCK_VALUES


BLOCK_VALUES = 16384
"""Of a block's own frames: ``kBlockFloats`` of csrc/convolution_sums.h."""


def residual_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    dilations: Sequence[int],
    lengths_frames: Tensor | None = None,
) -> Tensor:
    """x of U units, one after the other; differentiable in x and all weights.

    As `gmm_jepa.ops.residual_unit`, whose parameters are stacked.

    Args:
        x: (B, T, C) float; frames beyond a row's length are zero.
        weight1: (U, C, C, 3), of the dilated convolutions.
        bias1: (U, C)
        weight2: (U, C, C, 3), of the plain ones.
        bias2: (U, C)
        dilations: of the U units, 1 to 2^31 each.
        lengths_frames: (B,) int64, real frames of each row; None: all.

    Returns:
        (B, T, C) of x's dtype.

    Raises:
        InputError: shapes do not fit.
    """
    check_sequence(x)
    U, C = len(dilations), x.shape[2]
    weights = (weight1, bias1, weight2, bias2)
    names = ("weight1", "bias1", "weight2", "bias2")
    check_shapes(x, names, weights, ((U, C, C, 3), (U, C)) * 2)
    if not U or not 1 <= min(dilations) <= max(dilations) <= MOST_DILATION:
        raise InputError(f"dilations: expected some, 1 to 2^31 each, got {list(dilations)}")
    check_lengths(lengths_frames, x)
    narrow = allows_narrow(x)
    return _block(x, *weights, lengths_frames, list(dilations), narrow)


def residual_block_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilations: Sequence[int],
    narrow: bool,
) -> Tensor:
    """`residual_block` in plain torch; `narrow` allows to round what is multiplied."""
    return _forward(x, (weight1, bias1, weight2, bias2), lengths_frames, dilations, narrow)[-1]


def _forward(
    x: Tensor,
    weights: tuple[Tensor, ...],
    lengths_frames: Tensor | None,
    dilations: Sequence[int],
    narrow: bool,
) -> list[Tensor]:
    """Input and hidden values of every unit in turn, and the last one's output."""
    values = [x]
    for *of_unit, dilation in zip(*weights, dilations):
        arguments = (*of_unit, lengths_frames, dilation, True, narrow)
        out, hidden = residual_unit_reference(values[-1], *arguments)
        values += [hidden, out]
    return values


def residual_block_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilations: Sequence[int],
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the weights, in plain torch."""
    weights = (weight1, bias1, weight2, bias2)
    *values, _ = _forward(x, weights, lengths_frames, dilations, narrow)
    of_units = []
    for u in reversed(range(len(dilations))):
        made = values[2 * u : 2 * u + 2]
        options = (lengths_frames, dilations[u], narrow)
        of_unit = (w[u] for w in weights)
        grad, *of_weights = residual_unit_backward_reference(grad, *made, *of_unit, *options)
        of_units.insert(0, of_weights)
    return grad.clone(), *(torch.stack(list(of_one)) for of_one in zip(*of_units))


_block = Operator("gmm_jepa::residual_block", residual_block_reference)
_block_backward = Operator("gmm_jepa::residual_block_backward", residual_block_backward_reference)


@_block.register_fake
def _(x, weight1, bias1, weight2, bias2, lengths_frames, dilations, narrow):
    return x.new_empty(x.shape)


@_block_backward.register_fake
def _(grad, x, weight1, bias1, weight2, bias2, lengths_frames, dilations, narrow):
    return tuple(t.new_empty(t.shape) for t in (x, weight1, bias1, weight2, bias2))


def _setup(ctx, inputs, output):
    *tensors, ctx.dilations, ctx.narrow = inputs
    ctx.save_for_backward(*tensors)


def _vjp(ctx, grad):
    gradients = _block_backward(grad, *ctx.saved_tensors, ctx.dilations, ctx.narrow)
    return *gradients, None, None, None


_block.register_autograd(_vjp, setup_context=_setup)

for _op in (_block, _block_backward):
    _op.register_autocast("cpu", torch.float32)
