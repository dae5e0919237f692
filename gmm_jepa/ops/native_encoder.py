"""The native module's kernels of an encoder's operators on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmm_jepa.ops.attention import (
    _attention,
    _attention_backward,
    _empty,
    attention_backward_reference,
    attention_reference,
)
from gmm_jepa.ops.depthwise import (
    _depthwise,
    _depthwise_backward,
    depthwise_backward_reference,
    depthwise_reference,
)
from gmm_jepa.ops.dropout import _dropout, dropout_reference
from gmm_jepa.ops.native import (
    address_of,
    call,
    check,
    drawn_by,
    instruction_sets,
    lengths_of,
)


def gated_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, d) and log of each softmax's sum (B, H, T), in float32."""
    if not _is_attention(q, k, v, table, gate):
        return attention_reference(q, k, v, table, gate, key_lengths, seed, dropout_p)
    key_lengths = lengths_of(key_lengths, q)
    if _some_have_no_keys(key_lengths):
        out, log_sum = _empty(q).zero_(), gate.new_full(gate.shape, math.inf, dtype=torch.float32)
        some = key_lengths.nonzero().squeeze(1)
        if len(some):
            inputs = (*(t[some] for t in (q, k, v)), table, gate[some], key_lengths[some])
            out[some], log_sum[some] = gated_bias_attention(*inputs, seed, dropout_p)
        return out, log_sum
    inputs = _AttentionInputs(q, k, v, table, gate, key_lengths)
    out, log_sum = _empty(inputs.qkv[0]), inputs.gate.new_empty(gate.shape)
    call(
        "gated_bias_attention",
        *inputs.arguments(),
        drawn_by(seed, dropout_p),
        out.data_ptr(),
        log_sum.data_ptr(),
    )
    return out.to(q.dtype), log_sum


def gated_bias_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, table and gate."""
    tensors = (q, k, v, table, gate)
    if not _is_attention(*tensors):
        return attention_backward_reference(
            grad, out, log_sum, *tensors, key_lengths, seed, dropout_p
        )
    key_lengths = lengths_of(key_lengths, q)
    if _some_have_no_keys(key_lengths):
        gradients = (
            *(_empty(t).zero_() for t in (q, k, v)),
            *(t.new_zeros(t.shape) for t in (table, gate)),
        )
        some = key_lengths.nonzero().squeeze(1)
        if len(some):
            rows = (t[some] for t in (grad, out, log_sum, q, k, v))
            inputs = (*rows, table, gate[some], key_lengths[some], seed, dropout_p)
            *of_rows, of_table, of_gate = gated_bias_attention_backward(*inputs)
            gradients[3].copy_(of_table)
            for all_rows, part in zip((*gradients[:3], gradients[4]), (*of_rows, of_gate)):
                all_rows[some] = part
        return gradients
    inputs = _AttentionInputs(*tensors, key_lengths)
    grad, out, log_sum = _dense_rows(grad), _dense_rows(out), log_sum.contiguous()
    check("attention", (grad, out, log_sum), (q.shape, q.shape, gate.shape))
    gradients = (
        *map(_empty, inputs.qkv),
        inputs.table.new_empty(table.shape),
        inputs.gate.new_empty(gate.shape),
    )
    call(
        "gated_bias_attention_backward",
        *inputs.arguments(),
        drawn_by(seed, dropout_p),
        _head_rows(grad),
        _head_rows(out),
        log_sum.data_ptr(),
        tuple(g.data_ptr() for g in gradients),
    )
    return tuple(g.to(t.dtype) for g, t in zip(gradients, tensors))


def _some_have_no_keys(key_lengths: Tensor | None) -> bool:
    """Rows that the module does not take; their outputs and gradients are zero."""
    return key_lengths is not None and bool((key_lengths == 0).any())


class _AttentionInputs:
    """The tensors of an attention as the module takes them, alive for the call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        gate: Tensor,
        key_lengths: Tensor | None,
    ) -> None:
        self.qkv = [_dense_rows(t) for t in (q, k, v)]
        self.table, self.gate = table.float().contiguous(), gate.float().contiguous()
        self.lengths = key_lengths
        B, H, T, _ = q.shape
        shapes = (q.shape, q.shape, q.shape, (H, 2 * T - 1), (B, H, T))
        check("attention", (*self.qkv, self.table, self.gate), shapes)

    def arguments(self) -> tuple[tuple, tuple]:
        """Shape and inputs."""
        return (*self.qkv[0].shape, address_of(self.lengths)), (
            *map(_head_rows, self.qkv),
            self.table.data_ptr(),
            self.gate.data_ptr(),
        )


def _dense_rows(x: Tensor) -> Tensor:
    """x (B, H, T, d) in float32 with its last axis dense."""
    x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


def _head_rows(x: Tensor) -> tuple[int, int, int, int]:
    return (x.data_ptr(), *x.stride()[:3])


def _is_attention(*tensors: Tensor) -> bool:
    """All but float64; the half types are computed in float32."""
    return all(t.dtype != torch.float64 for t in tensors) and tensors[0].shape[3] > 0


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x dropped out in float32."""
    if x.dtype != torch.float32:
        return dropout_reference(x, seed, p)
    x = x.contiguous()
    out = torch.empty_like(x)
    call(
        "dropout",
        x.data_ptr(),
        x.numel(),
        drawn_by(seed, p),
        out.data_ptr(),
    )
    return out


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A filter of odd length a channel over (B, T, C), in float32; of x's dtype."""
    if not _is_depthwise(x, weight):
        return depthwise_reference(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    wide, *parameters = (t.float().contiguous() for t in tensors)
    check("depthwise_conv", parameters, _depthwise_shapes(weight, x))
    out = torch.empty_like(wide)
    addresses = [p.data_ptr() for p in parameters] + [0] * (bias is None)
    shape = (*x.shape, weight.shape[-1])
    call("depthwise_conv", shape, wide.data_ptr(), *addresses, out.data_ptr())
    return out.to(x.dtype)


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, or (0,) without one."""
    if not _is_depthwise(x, weight):
        return depthwise_backward_reference(grad, x, weight, with_bias)
    inputs = tuple(t.float().contiguous() for t in (grad, x, weight))
    check("depthwise_conv", (inputs[0], inputs[2]), (x.shape, _depthwise_shapes(weight, x)[0]))
    d_x, d_weight = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    d_bias = d_weight.new_empty(x.shape[2] if with_bias else 0)
    addresses = (d_x.data_ptr(), d_weight.data_ptr(), d_bias.data_ptr() if with_bias else 0)
    shape = (*x.shape, weight.shape[-1])
    call("depthwise_conv_backward", shape, *(t.data_ptr() for t in inputs), addresses)
    return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _depthwise_shapes(weight: Tensor, x: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of weight, (C, 1, K) or (C, K), and bias for x (B, T, C)."""
    _, _, C = x.shape
    return (C, *[1] * (weight.ndim - 2), weight.shape[-1]), (C,)


def _is_depthwise(x: Tensor, weight: Tensor) -> bool:
    """No float64, and channels that fill the vectors of every instruction set."""
    narrow = all(t.dtype != torch.float64 for t in (x, weight))
    return narrow and x.numel() > 0 and x.shape[2] % 16 == 0


if instruction_sets():
    _attention.register_kernel("cpu")(gated_bias_attention)
    _attention_backward.register_kernel("cpu")(gated_bias_attention_backward)
    _depthwise.register_kernel("cpu")(depthwise_conv)
    _depthwise_backward.register_kernel("cpu")(depthwise_conv_backward)
    _dropout.register_kernel("cpu")(dropout)
