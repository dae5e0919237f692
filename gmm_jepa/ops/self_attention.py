"""A block's self-attention with its residual, x + W_o attention(W_qkv x).

On a CPU one op takes blocks of frames through the maps before and behind the attention of
`gmm_jepa.ops.attention`, without a pass of its own for what lies between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.ops.attention import attention_backward_reference, attention_reference
from gmm_jepa.ops.checks import check_probability, check_sequence, check_shapes
from gmm_jepa.ops.dropout import drawn_seed
from gmm_jepa.ops.fused import allows_narrow
from gmm_jepa.ops.lengths import check_lengths
from gmm_jepa.ops.operator import Operator


class AttentionWeights(NamedTuple):
    """Parameters of a self-attention, as `torch.nn.Linear` has them, D = H d."""

    qkv: Tensor
    """(3 D, D): queries, keys, values, each by head."""
    qkv_bias: Tensor
    """(3 D,)"""
    out: Tensor
    """(D, D)"""
    out_bias: Tensor
    """(D,)"""
    table: Tensor
    """(H, 2 T - 1), the bias of relative position rel at column rel + T - 1."""
    gate_u: Tensor
    """(H, d)"""
    gate_r: Tensor
    """(H, d)"""
    gate_scale: Tensor
    """(H,)"""


def self_attention(
    x: Tensor,
    weights: AttentionWeights,
    *,
    lengths_frames: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x + out(drop(softmax(q k' / sqrt(d) + table gate)) v) of (q, k, v) = qkv(x).

    With u = sigmoid(q . gate_u) and r = sigmoid(q . gate_r) of a head's query
    gate = 1 + u + (1 - u) r gate_scale. Differentiable in x and all weights. On a CPU under
    autocast to bfloat16 x is taken as float32 and stays so; what the maps multiply is rounded to
    bfloat16, on the way back too, where the processor has products of it.

    Args:
        x: (B, T, D) float, T at least 1, of the weights' dtype but under autocast on CPUs.
        weights: of the maps, the bias and its gates.
        lengths_frames: (B,) int64, real frames of each row, which are its keys (frame 0 where there
            are none); None: all.
        dropout_p: dropout on the probabilities, at least 0 and below 1, drawn from torch's own
            generator.

    Returns:
        (B, T, D) of x's dtype.

    Raises:
        InputError: shapes do not fit, or dropout_p is out of its range.
    """
    check_probability("dropout_p", dropout_p)
    check_sequence(x, fewest_frames=1)
    check_lengths(lengths_frames, x)
    shapes = self_attention_shapes(x, weights.gate_scale)
    check_shapes(x, weights._fields, weights, shapes)
    narrow = allows_narrow(x)
    seed = drawn_seed(dropout_p)
    return _self_attention(x, *weights, lengths_frames, seed, dropout_p, narrow)[0]


def self_attention_shapes(x: Tensor, gate_scale: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of the weights for x (B, T, D) and gate_scale (H,)."""
    (_, T, D), H = x.shape, len(gate_scale)
    heads = (H, D // max(H, 1))
    return (3 * D, D), (3 * D,), (D, D), (D,), (H, 2 * T - 1), heads, heads, (H,)


def _keys(lengths_frames: Tensor | None) -> Tensor | None:
    return None if lengths_frames is None else lengths_frames.clamp(min=1)


def _gates(q: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (B, H, T) of queries (B, H, T, d), and the u and r that they are made of."""
    u = torch.sigmoid((q * weights.gate_u[:, None]).sum(-1))
    r = torch.sigmoid((q * weights.gate_r[:, None]).sum(-1))
    return 1 + u + (1 - u) * r * weights.gate_scale[:, None], u, r


def _heads_of(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 D) -> queries, keys, values, each (B, H, T, d)."""
    return qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def self_attention_reference(
    x: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    table: Tensor,
    gate_u: Tensor,
    gate_r: Tensor,
    gate_scale: Tensor,
    lengths_frames: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`self_attention` in plain torch, and what its gradient needs.

    In x's dtype: `narrow` allows to round what is multiplied, and does not ask for it.

    Returns:
        (B, T, D), the result; (B, T, 3 D), queries, keys and values; (B, T, D), the attention's
        output; (B, H, T) log of each softmax's sum; (B, H, T) gates.
    """
    weights = AttentionWeights(qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    with torch.autocast(x.device.type, enabled=False):
        made = F.linear(x, qkv, qkv_bias)
        q, k, v = _heads_of(made, len(gate_scale))
        gate = _gates(q, weights)[0]
        y, log_sum = attention_reference(
            q, k, v, table, gate, _keys(lengths_frames), seed, dropout_p
        )
        attended = y.transpose(1, 2).flatten(2).contiguous()
        result = (x + F.linear(attended, out, out_bias)).contiguous()
        return result, made, attended, log_sum, gate


def self_attention_backward_reference(
    grad: Tensor,
    x: Tensor,
    made: Tensor,
    attended: Tensor,
    log_sum: Tensor,
    gate: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    table: Tensor,
    gate_u: Tensor,
    gate_r: Tensor,
    gate_scale: Tensor,
    lengths_frames: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the weights, in plain torch."""
    weights = AttentionWeights(qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    H = len(gate_scale)
    with torch.autocast(x.device.type, enabled=False):
        q, k, v = _heads_of(made, H)
        y = attended.unflatten(-1, (H, -1)).transpose(1, 2)
        of_y = (grad @ out).unflatten(-1, (H, -1)).transpose(1, 2)
        of_q, of_k, of_v, d_table, of_gate = attention_backward_reference(
            of_y, y, log_sum, q, k, v, table, gate, _keys(lengths_frames), seed, dropout_p
        )
        _, u, r = _gates(q, weights)
        s = gate_scale[:, None]
        of_u = (of_gate * (1 - r * s) * u * (1 - u))[..., None]
        of_r = (of_gate * (1 - u) * s * r * (1 - r))[..., None]
        of_q = of_q + of_u * gate_u[:, None] + of_r * gate_r[:, None]
        of_made = torch.stack([of_q, of_k, of_v]).permute(1, 3, 0, 2, 4).flatten(2)
        rows = of_made.flatten(0, 1)
        return (
            (grad + of_made @ qkv).contiguous(),
            rows.T @ x.flatten(0, 1),
            rows.sum(0),
            grad.flatten(0, 1).T @ attended.flatten(0, 1),
            grad.sum((0, 1)),
            d_table,
            (of_u * q).sum((0, 2)),
            (of_r * q).sum((0, 2)),
            (of_gate * (1 - u) * r).sum((0, 2)),
        )


_self_attention = Operator("gmm_jepa::self_attention", self_attention_reference)
_self_attention_backward = Operator(
    "gmm_jepa::self_attention_backward", self_attention_backward_reference
)


@_self_attention.register_fake
def _(x, qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale, *options):
    B, T, D = x.shape
    of_heads = x.new_empty((B, len(gate_scale), T))
    log_sum = torch.empty_like(of_heads, dtype=torch.promote_types(x.dtype, torch.float32))
    return (
        x.new_empty(x.shape),
        x.new_empty((B, T, 3 * D)),
        x.new_empty(x.shape),
        log_sum,
        of_heads,
    )


@_self_attention_backward.register_fake
def _(grad, x, made, attended, log_sum, gate, *weights_and_options):
    return tuple(t.new_empty(t.shape) for t in (x, *weights_and_options[:8]))


def _setup(ctx, inputs, output):
    x, *tensors, ctx.dropout_p, ctx.narrow = inputs
    ctx.save_for_backward(x, *output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    gradients = _self_attention_backward(grad, *ctx.saved_tensors, ctx.dropout_p, ctx.narrow)
    return *gradients, None, None, None, None


_self_attention.register_autograd(_vjp, setup_context=_setup)

for _op in (_self_attention, _self_attention_backward):
    _op.register_autocast("cpu", torch.float32)
