"""The feed-forward part of a block with its residual, x + scale (W2 gelu(W1 x + b1) + b2).

On a CPU one op takes a block of frames through both maps while its hidden values are in cache; for
the gradient it keeps what the first map made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """x + scale (down(gelu(up(x)))), differentiable in all tensors; no dropout.

    On a CPU under autocast to bfloat16 x is taken as float32 and stays so; what is multiplied is
    rounded to bfloat16, on the way back too, where the processor has products of it.

    Args:
        x: (..., D) float.
        up_weight: (H, D), as in `torch.nn.Linear`.
        up_bias: (H,)
        down_weight: (D, H)
        down_bias: (D,)
        scale: of what is added.

    Returns:
        (..., D) of x's dtype.

    Raises:
        InputError: shapes do not fit.
    """
    D, H = x.shape[-1] if x.ndim else 0, len(up_bias)
    for name, tensor, shape in (
        ("up_weight", up_weight, (H, D)),
        ("up_bias", up_bias, (H,)),
        ("down_weight", down_weight, (D, H)),
        ("down_bias", down_bias, (D,)),
    ):
        if tensor.shape != shape:
            raise InputError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    tensors = (x, up_weight, up_bias, down_weight, down_bias)
    keep_hidden = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    narrow = torch.is_autocast_enabled(x.device.type)
    return _feed_forward(*tensors, scale, keep_hidden, narrow)[0]


def feed_forward_reference(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    scale: float,
    keep_hidden: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """`feed_forward` in plain torch, and what the first map made, or (0,) without.

    It is in x's dtype: `narrow` allows to round what is multiplied, and does not ask for it.
    """
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.linear(x, up_weight, up_bias)
        out = x + scale * F.linear(F.gelu(hidden), down_weight, down_bias)
    return out, hidden if keep_hidden else x.new_empty(0)


def feed_forward_backward_reference(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    scale: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and biases, in plain torch."""
    rows, hidden_rows = x.flatten(0, -2), hidden.flatten(0, -2)
    with torch.autocast(x.device.type, enabled=False):
        of_output = scale * grad.flatten(0, -2)
        of_hidden = torch.ops.aten.gelu_backward(of_output @ down_weight, hidden_rows)
        d_x = grad + (of_hidden @ up_weight).reshape(x.shape)
        d_up, d_down = of_hidden.T @ rows, of_output.T @ F.gelu(hidden_rows)
    return d_x, d_up, of_hidden.sum(0), d_down, of_output.sum(0)


_feed_forward = torch.library.custom_op(
    "gmm_jepa::feed_forward", feed_forward_reference, mutates_args=()
)
_feed_forward_backward = torch.library.custom_op(
    "gmm_jepa::feed_forward_backward", feed_forward_backward_reference, mutates_args=()
)


@_feed_forward.register_fake
def _(x, up_weight, up_bias, down_weight, down_bias, scale, keep_hidden, narrow):
    hidden = x.new_empty((*x.shape[:-1], len(up_bias)) if keep_hidden else (0,))
    return x.new_empty(x.shape), hidden


@_feed_forward_backward.register_fake
def _(grad, x, hidden, up_weight, up_bias, down_weight, down_bias, scale, narrow):
    return tuple(t.new_empty(t.shape) for t in (x, up_weight, up_bias, down_weight, down_bias))


def _setup(ctx, inputs, output):
    x, *parameters, ctx.scale, _, ctx.narrow = inputs
    ctx.save_for_backward(x, output[1], *parameters)
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    gradients = _feed_forward_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.narrow)
    return *gradients, None, None, None


_feed_forward.register_autograd(_vjp, setup_context=_setup)

for _op in (_feed_forward, _feed_forward_backward):
    _op.register_autocast("cpu", torch.float32)
