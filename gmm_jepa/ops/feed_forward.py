"""The feed-forward part of a block with its residual.

    x + scale drop(W2 drop(gelu(W1 norm(x) + b1)) + b2)

On a CPU one op takes a block of frames through both maps while its hidden values are in cache; for
the gradient it keeps what the first map made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_probability, check_shapes
from gmm_jepa.ops.dropout import drawn_seed, dropout_reference
from gmm_jepa.ops.fused import allows_narrow
from gmm_jepa.ops.operator import Operator


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    epsilon: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """x + scale drop(down(drop(gelu(up(norm(x)))))), differentiable in all tensors.

    On a CPU under autocast to bfloat16 x is taken as float32 and stays so; what is multiplied is
    rounded to bfloat16, on the way back too, where the processor has products of it.

    Args:
        x: (..., D) float, of the weights' dtype but under autocast on CPUs.
        up_weight: (H, D), as in `torch.nn.Linear`.
        up_bias: (H,)
        down_weight: (D, H)
        down_bias: (D,)
        norm_weight: (D,), of a layer norm before the first map; None: there is none.
        norm_bias: (D,), with it.
        scale: of what is added.
        epsilon: added to the norm's variances.
        dropout_p: of both dropouts, at least 0 and below 1, drawn from torch's own generator.

    Returns:
        (..., D) of x's dtype.

    Raises:
        InputError: shapes do not fit, or dropout_p is out of its range.
    """
    check_probability("dropout_p", dropout_p)
    tensors = (x, up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias)
    names = ("up_weight", "up_bias", "down_weight", "down_bias", "norm_weight", "norm_bias")
    given = tensors[1:] if norm_weight is not None or norm_bias is not None else tensors[1:5]
    check_shapes(x, names, given, feed_forward_shapes(x, up_bias))
    keep_hidden = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    narrow = allows_narrow(x)
    seed = drawn_seed(dropout_p)
    return _feed_forward(*tensors, seed, scale, epsilon, dropout_p, keep_hidden, narrow)[0]


def feed_forward_shapes(x: Tensor, up_bias: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of the weights and biases for x (..., D) and up_bias (H,)."""
    D, H = x.shape[-1] if x.ndim else 0, len(up_bias)
    return (H, D), (H,), (D, H), (D,), (D,), (D,)


def _masks(seed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Seeds of the masks of hidden values and of outputs."""
    return seed, None if seed is None else ~seed


def _normal(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    return x if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def feed_forward_reference(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    epsilon: float,
    dropout_p: float,
    keep_hidden: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """`feed_forward` in plain torch, and what the first map made, or (0,) without.

    It is in x's dtype: `narrow` allows to round what is multiplied, and does not ask for it. What
    is kept is bfloat16 with it.
    """
    hidden_seed, output_seed = _masks(seed)
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.linear(_normal(x, norm_weight, norm_bias, epsilon), up_weight, up_bias)
        activated = dropout_reference(F.gelu(hidden), hidden_seed, dropout_p)
        made = F.linear(activated, down_weight, down_bias)
        out = (x + scale * dropout_reference(made, output_seed, dropout_p)).contiguous()
    kept = torch.bfloat16 if narrow else x.dtype
    return out, hidden.to(kept) if keep_hidden else x.new_empty(0, dtype=kept)


def feed_forward_backward_reference(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    epsilon: float,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights and biases, in plain torch; (0,) of a norm that there is not."""
    check_hidden(x, hidden, up_bias)
    rows, hidden_rows = x.reshape(-1, x.shape[-1]), hidden.to(x.dtype).reshape(-1, len(up_bias))
    d_norm, d_norm_bias = x.new_empty(0), x.new_empty(0)
    hidden_seed, output_seed = _masks(seed)
    with torch.autocast(x.device.type, enabled=False):
        of_output = scale * dropout_reference(grad.reshape(rows.shape), output_seed, dropout_p)
        of_activated = dropout_reference(of_output @ down_weight, hidden_seed, dropout_p)
        of_hidden = torch.ops.aten.gelu_backward(of_activated, hidden_rows)
        of_rows = of_hidden @ up_weight
        inputs = _normal(rows, norm_weight, norm_bias, epsilon)
        if norm_weight is not None:
            _, mean, scales = torch.native_layer_norm(
                rows, rows.shape[-1:], norm_weight, norm_bias, epsilon
            )
            of_rows, d_norm, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
                of_rows, rows, rows.shape[-1:], mean, scales, norm_weight, norm_bias, [True] * 3
            )
        d_x = (grad + of_rows.reshape(x.shape)).contiguous()
        activated = dropout_reference(F.gelu(hidden_rows), hidden_seed, dropout_p)
        d_up, d_down = of_hidden.T @ inputs, of_output.T @ activated
    return d_x, d_up, of_hidden.sum(0), d_down, of_output.sum(0), d_norm, d_norm_bias


def check_hidden(x: Tensor, hidden: Tensor, up_bias: Tensor) -> None:
    """Raise InputError where the forward pass did not keep what the gradient needs."""
    shape = (*x.shape[:-1], len(up_bias))
    if hidden.shape != shape:
        raise InputError(f"hidden: expected {shape}, got {tuple(hidden.shape)}: it was not kept")


_feed_forward = Operator("gmm_jepa::feed_forward", feed_forward_reference)
_feed_forward_backward = Operator(
    "gmm_jepa::feed_forward_backward", feed_forward_backward_reference
)


@_feed_forward.register_fake
def _(x, up_weight, up_bias, *rest):
    *_, keep_hidden, narrow = rest
    shape = (*x.shape[:-1], len(up_bias)) if keep_hidden else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.bfloat16 if narrow else x.dtype)


@_feed_forward_backward.register_fake
def _(grad, x, hidden, *rest):
    return tuple(x.new_empty((0,) if t is None else t.shape) for t in (x, *rest[:6]))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.epsilon, ctx.dropout_p, _, ctx.narrow = inputs
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    tensors, options = ctx.saved_tensors, (ctx.scale, ctx.epsilon, ctx.dropout_p, ctx.narrow)
    *gradients, d_norm, d_norm_bias = _feed_forward_backward(grad, *tensors, *options)
    of_norm = (None, None) if tensors[-2] is None else (d_norm, d_norm_bias)
    return *gradients, *of_norm, None, None, None, None, None, None


_feed_forward.register_autograd(_vjp, setup_context=_setup)

for _op in (_feed_forward, _feed_forward_backward):
    _op.register_autocast("cpu", torch.float32)
