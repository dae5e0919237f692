"""The native module's kernels of the encoders' operators on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.ops import fused
from gmm_jepa.ops.attention import (
    _attention,
    _attention_backward,
    _empty,
    attention_backward_reference,
    attention_reference,
)
from gmm_jepa.ops.density import (
    _density_attention,
    _density_attention_backward,
    density_attention_backward_reference,
    density_attention_reference,
)
from gmm_jepa.ops.depthwise import (
    _depthwise,
    _depthwise_backward,
    depthwise_backward_reference,
    depthwise_reference,
)
from gmm_jepa.ops.dropout import _dropout, dropout_reference
from gmm_jepa.ops.native import call, instruction_sets
from gmm_jepa.ops.residual import (
    _unit,
    _unit_backward,
    residual_unit_backward_reference,
    residual_unit_reference,
)
from gmm_jepa.ops.residual_block import (
    CHANNELS,
    _block,
    _block_backward,
    residual_block_backward_reference,
    residual_block_reference,
)
from gmm_jepa.ops.snake import (
    _snake,
    _snake_backward,
    snake_backward_reference,
    snake_reference,
)
from gmm_jepa.ops.waveform import (
    _waveform_conv,
    _waveform_conv_backward,
    of_ends,
    take_off,
    waveform_conv_backward_reference,
    waveform_conv_reference,
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
        "attention",
        *inputs.arguments(),
        _seed_and_probability(seed, dropout_p),
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
    gradients = (
        *map(_empty, inputs.qkv),
        inputs.table.new_empty(table.shape),
        inputs.gate.new_empty(gate.shape),
    )
    call(
        "attention_backward",
        *inputs.arguments(),
        _seed_and_probability(seed, dropout_p),
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
        self.lengths = _lengths(key_lengths)

    def arguments(self) -> tuple[tuple, tuple]:
        """Shape and inputs."""
        return (*self.qkv[0].shape, _address(self.lengths)), (
            *map(_head_rows, self.qkv),
            self.table.data_ptr(),
            self.gate.data_ptr(),
        )


def _lengths(lengths: Tensor | None) -> Tensor | None:
    """As the module takes them: int64, dense."""
    return None if lengths is None else lengths.long().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense_rows(x: Tensor) -> Tensor:
    """x (B, H, T, d) in float32 with its last axis dense."""
    x = x.float()
    return x if x.stride(3) == 1 else x.contiguous()


def _head_rows(x: Tensor) -> tuple[int, int, int, int]:
    return (x.data_ptr(), *x.stride()[:3])


def _seed_and_probability(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (0, 0.0) if seed is None else (int(seed) & (2**64 - 1), dropout_p)


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
        _seed_and_probability(seed, p),
        out.data_ptr(),
    )
    return out


def density_attention(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
) -> Tensor:
    """x + x softmax(log-density) over time, in float32."""
    if not _is_density(x):
        return density_attention_reference(x, offsets, squared_widths, lengths_frames)
    x, *parameters = (t.float().contiguous() for t in (x, offsets, squared_widths))
    out = torch.empty_like(x)
    lengths = _lengths(lengths_frames)
    call(
        "density_attention",
        (*x.shape, _address(lengths)),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        out.data_ptr(),
    )
    return out


def density_attention_backward(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    squared_widths: Tensor,
    lengths_frames: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `density_attention`."""
    if not _is_density(x):
        return density_attention_backward_reference(
            grad, x, offsets, squared_widths, lengths_frames
        )
    grad, x, *parameters = (t.float().contiguous() for t in (grad, x, offsets, squared_widths))
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    lengths = _lengths(lengths_frames)
    call(
        "density_attention_backward",
        (*x.shape, _address(lengths)),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def _is_density(x: Tensor) -> bool:
    """Float32 with channels that fill the vectors of every instruction set."""
    return x.dtype == torch.float32 and x.numel() > 0 and x.shape[2] % 16 == 0


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A filter of odd length a channel over (B, T, C), in float32; of x's dtype."""
    if not _is_depthwise(x, weight):
        return depthwise_reference(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    wide, *parameters = (t.float().contiguous() for t in tensors)
    out = torch.empty_like(wide)
    addresses = [p.data_ptr() for p in parameters] + [0] * (bias is None)
    shape = (*x.shape, weight.shape[-1])
    call("depthwise", shape, wide.data_ptr(), *addresses, out.data_ptr())
    return out.to(x.dtype)


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, or (0,) without one."""
    if not _is_depthwise(x, weight):
        return depthwise_backward_reference(grad, x, weight, with_bias)
    inputs = tuple(t.float().contiguous() for t in (grad, x, weight))
    d_x, d_weight = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    d_bias = d_weight.new_empty(x.shape[2] if with_bias else 0)
    addresses = (d_x.data_ptr(), d_weight.data_ptr(), d_bias.data_ptr() if with_bias else 0)
    shape = (*x.shape, weight.shape[-1])
    call("depthwise_backward", shape, *(t.data_ptr() for t in inputs), addresses)
    return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _is_depthwise(x: Tensor, weight: Tensor) -> bool:
    """No float64, and channels that fill the vectors of every instruction set."""
    narrow = all(t.dtype != torch.float64 for t in (x, weight))
    return narrow and x.numel() > 0 and x.shape[2] % 16 == 0


def waveform_conv(
    x: Tensor, taps: Tensor, bias: Tensor, ends: Tensor, last: Tensor, stride: int
) -> Tensor:
    """Strided convolution of one channel, in float32, less the ends."""
    if not _is_waveform(x, taps, bias):
        return waveform_conv_reference(x, taps, bias, ends, last, stride)
    x, taps, bias = x.contiguous(), taps.contiguous(), bias.contiguous()
    out = x.new_empty((len(x), (x.shape[1] - taps.shape[1]) // stride + 1, len(taps)))
    addresses = (x.data_ptr(), taps.data_ptr(), bias.data_ptr(), out.data_ptr())
    call("waveform_conv", _waveform_shape(x, taps, stride), *addresses)
    return take_off(out, ends, last)


def waveform_conv_backward(
    grad: Tensor, x: Tensor, taps: Tensor, last: Tensor, stride: int, with_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of taps, bias and ends, in float32; with that of x all by torch."""
    if with_x or not _is_waveform(x, taps, grad):
        return waveform_conv_backward_reference(grad, x, taps, last, stride, with_x)
    grad, x = grad.contiguous(), x.contiguous()
    d_taps = torch.empty_like(taps, memory_format=torch.contiguous_format)
    d_bias = taps.new_empty(len(taps))
    addresses = (x.data_ptr(), grad.data_ptr(), d_taps.data_ptr(), d_bias.data_ptr())
    call("waveform_conv_backward", _waveform_shape(x, taps, stride), *addresses)
    return x.new_empty(0), d_taps, d_bias, of_ends(grad, last)


def _waveform_shape(x: Tensor, taps: Tensor, stride: int) -> tuple[int, ...]:
    n_frames = (x.shape[1] - taps.shape[1]) // stride + 1
    return (*x.shape, n_frames, stride, taps.shape[1], len(taps))


def _is_waveform(*tensors: Tensor) -> bool:
    """Float32, and at least one value."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors)


def residual_unit(
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
    """x + conv(lrelu(conv(lrelu(x)))), and what the first convolution made, both float32."""
    tensors = (x, weight1, bias1, weight2, bias2)
    if not _is_residual(*tensors):
        return residual_unit_reference(*tensors, lengths_frames, dilation, keep_hidden, narrow)
    x, *parameters = (t.contiguous() for t in tensors)
    out = torch.empty_like(x)
    hidden = torch.empty_like(x) if keep_hidden else x.new_empty(0)
    lengths = _lengths(lengths_frames)
    call(
        "residual_forward",
        (*x.shape, dilation, _address(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        hidden.data_ptr() if keep_hidden else 0,
        out.data_ptr(),
    )
    return out, hidden


def residual_unit_backward(
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
    """Gradients of x and the parameters of `residual_unit`."""
    tensors = (grad, x, hidden, weight1, bias1, weight2, bias2)
    if not _is_residual(*tensors):
        return residual_unit_backward_reference(*tensors, lengths_frames, dilation, narrow)
    grad, x, hidden, *parameters = (t.contiguous() for t in tensors)
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    lengths = _lengths(lengths_frames)
    call(
        "residual_backward",
        (*x.shape, dilation, _address(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        hidden.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def residual_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilations: Sequence[int],
    narrow: bool,
) -> Tensor:
    """Residual units one after the other, in float32."""
    tensors = (x, weight1, bias1, weight2, bias2)
    if x.shape[2] not in CHANNELS or not _is_residual(*tensors):
        return residual_block_reference(*tensors, lengths_frames, dilations, narrow)
    x, *parameters = (t.contiguous() for t in tensors)
    out, lengths = torch.empty_like(x), _lengths(lengths_frames)
    call(
        "residual_block",
        (*x.shape, list(dilations), _address(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        out.data_ptr(),
    )
    return out


def residual_block_backward(
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
    """Gradients of x and the parameters of `residual_block`."""
    tensors = (grad, x, weight1, bias1, weight2, bias2)
    if x.shape[2] not in CHANNELS or not _is_residual(*tensors):
        return residual_block_backward_reference(*tensors, lengths_frames, dilations, narrow)
    grad, x, *parameters = (t.contiguous() for t in tensors)
    out, lengths = tuple(torch.empty_like(t) for t in (x, *parameters)), _lengths(lengths_frames)
    call(
        "residual_block_backward",
        (*x.shape, list(dilations), _address(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def _is_residual(*tensors: Tensor) -> bool:
    """What the native unit is made for: float32, and at least one value."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors)


def snake(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """x + sin(a x)^2 / a of float32 or bfloat16, in float32."""
    if not _is_snake(x, a):
        return snake_reference(x, a, lengths_frames)
    x, a, lengths = x.contiguous(), a.contiguous(), _lengths(lengths_frames)
    out = torch.empty_like(x, dtype=torch.float32)
    call(
        "snake",
        (*x.shape, _address(lengths)),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        a.data_ptr(),
        out.data_ptr(),
    )
    return out


def snake_backward(
    grad: Tensor, x: Tensor, a: Tensor, lengths_frames: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and a of `snake`."""
    if not _is_snake(x, a):
        return snake_backward_reference(grad, x, a, lengths_frames)
    x, a, lengths = x.contiguous(), a.contiguous(), _lengths(lengths_frames)
    grad = grad.float().contiguous()
    out = torch.empty_like(x), torch.empty_like(a)
    call(
        "snake_backward",
        (*x.shape, _address(lengths)),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        a.data_ptr(),
        grad.data_ptr(),
        *(o.data_ptr() for o in out),
    )
    return out


def _is_snake(x: Tensor, a: Tensor) -> bool:
    """Channels that fill the vectors of every instruction set."""
    types = x.dtype in (torch.float32, torch.bfloat16) and a.dtype == torch.float32
    return types and x.numel() > 0 and x.shape[2] % 16 == 0


if instruction_sets():
    _waveform_conv.register_kernel("cpu")(waveform_conv)
    _waveform_conv_backward.register_kernel("cpu")(waveform_conv_backward)
    fused.has_native = True
    _attention.register_kernel("cpu")(gated_bias_attention)
    _attention_backward.register_kernel("cpu")(gated_bias_attention_backward)
    _density_attention.register_kernel("cpu")(density_attention)
    _density_attention_backward.register_kernel("cpu")(density_attention_backward)
    _depthwise.register_kernel("cpu")(depthwise_conv)
    _depthwise_backward.register_kernel("cpu")(depthwise_conv_backward)
    _dropout.register_kernel("cpu")(dropout)
    _block.register_kernel("cpu")(residual_block)
    _block_backward.register_kernel("cpu")(residual_block_backward)
    _unit.register_kernel("cpu")(residual_unit)
    _unit_backward.register_kernel("cpu")(residual_unit_backward)
    _snake.register_kernel("cpu")(snake)
    _snake_backward.register_kernel("cpu")(snake_backward)
