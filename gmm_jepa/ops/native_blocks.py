"""The native module's kernels of a conformer block's parts on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.feed_forward import (
    _feed_forward,
    _feed_forward_backward,
    feed_forward_backward_reference,
    feed_forward_reference,
)
from gmm_jepa.ops.fused import HEAD_MULTIPLE, MAP_MULTIPLE
from gmm_jepa.ops.native import call, instruction_sets, multiplies_bfloat16
from gmm_jepa.ops.native_encoder import _address, _lengths
from gmm_jepa.ops.self_attention import (
    _self_attention,
    _self_attention_backward,
    self_attention_backward_reference,
    self_attention_reference,
)

def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    scale: float,
    keep_hidden: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """x + scale (W2 gelu(W1 x + b1) + b2), and what the first map made, rounded if `narrow`."""
    tensors = (x, up_weight, up_bias, down_weight, down_bias)
    if not _are_maps(*tensors):
        return feed_forward_reference(*tensors, scale, keep_hidden, narrow)
    x, *parameters = (t.contiguous() for t in tensors)
    H, D = up_weight.shape
    narrow = narrow and multiplies_bfloat16()
    kept = torch.bfloat16 if narrow else torch.float32
    hidden = x.new_empty((*x.shape[:-1], H) if keep_hidden else (0,), dtype=kept)
    out = torch.empty_like(x)
    call(
        "feed_forward",
        (x.numel() // D, D, H, scale, narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        hidden.data_ptr() if keep_hidden else 0,
        out.data_ptr(),
    )
    return out, hidden


def feed_forward_backward(
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
    """Gradients of x, weights and biases of `feed_forward`."""
    tensors = (grad, x, hidden, up_weight, up_bias, down_weight, down_bias)
    if not _are_maps(grad, x, *tensors[3:]):
        return feed_forward_backward_reference(*tensors, scale, narrow)
    grad, x, hidden, *parameters = (t.contiguous() for t in tensors)
    H, D = up_weight.shape
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    call(
        "feed_forward_backward",
        (x.numel() // D, D, H, scale, hidden.dtype == torch.bfloat16),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        hidden.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def self_attention(
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
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x + W_o attention(W_qkv x), and what its gradient needs."""
    tensors = (x, qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    if not _is_self_attention(*tensors):
        return self_attention_reference(*tensors, lengths_frames, narrow)
    x, *weights = (t.contiguous() for t in tensors)
    (B, T, D), H = x.shape, len(gate_scale)
    made, lengths = torch.empty_like(x), _lengths(lengths_frames)
    kept = tuple(x.new_empty(s) for s in ((B, T, 3 * D), (B, T, D), (B, H, T), (B, H, T)))
    call(
        "self_attention",
        (B, T, H, D, _address(lengths), narrow and multiplies_bfloat16()),
        tuple(w.data_ptr() for w in weights),
        x.data_ptr(),
        tuple(t.data_ptr() for t in kept),
        made.data_ptr(),
    )
    return made, *kept


def self_attention_backward(
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
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the weights of `self_attention`."""
    kept = (made, attended, log_sum, gate)
    weights = (qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    if not _is_self_attention(x, *weights):
        return self_attention_backward_reference(grad, x, *kept, *weights, lengths_frames, narrow)
    grad, x, *rest = (t.contiguous() for t in (grad, x, *kept, *weights))
    kept, weights = rest[:4], rest[4:]
    (B, T, D), H = x.shape, len(gate_scale)
    gradients, lengths = tuple(torch.empty_like(t) for t in (x, *weights)), _lengths(lengths_frames)
    call(
        "self_attention_backward",
        (B, T, H, D, _address(lengths), narrow and multiplies_bfloat16()),
        tuple(w.data_ptr() for w in weights),
        x.data_ptr(),
        tuple(t.data_ptr() for t in kept),
        grad.data_ptr(),
        tuple(g.data_ptr() for g in gradients),
    )
    return gradients


def _is_self_attention(x: Tensor, *weights: Tensor) -> bool:
    """Float32, widths that fill panels and tiles, and heads that fill vectors."""
    head_dims = weights[-2].shape[1]
    fits = x.numel() > 0 and x.shape[2] % MAP_MULTIPLE == 0 and head_dims % HEAD_MULTIPLE == 0
    return fits and all(t.dtype == torch.float32 for t in (x, *weights))


def _are_maps(*tensors: Tensor) -> bool:
    """What the module's maps are made for: float32, and sizes that fill panels and tiles."""
    return all(
        t.dtype == torch.float32 and t.numel() and t.shape[-1] % MAP_MULTIPLE == 0 for t in tensors
    )


if instruction_sets():
    _self_attention.register_kernel("cpu")(self_attention)
    _self_attention_backward.register_kernel("cpu")(self_attention_backward)
    _feed_forward.register_kernel("cpu")(feed_forward)
    _feed_forward_backward.register_kernel("cpu")(feed_forward_backward)
