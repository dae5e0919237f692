"""The native module's kernels of a front end's operators on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.ops.density import (
    CHUNKS,
    GAUSSIANS,
    _density_attention,
    _density_attention_backward,
    density_attention_backward_reference,
    density_attention_reference,
)
from gmm_jepa.ops.log_mel import _log_mel, log_mel_reference
from gmm_jepa.ops.native import (
    _native,
    address_of,
    call,
    check,
    instruction_sets,
    lengths_of,
    matrix_of,
)
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


def log_mel(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    hop: int,
    floor: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Log-mel frames (B, S // hop + 1, n_mels), in float32 but for a float64 waveform."""
    (B, S), n_mels = waveform.shape, filters.shape[1]
    n_fft = window.shape[0]
    # below float32's normal range a logarithm by parts of the number is not exact
    plain = waveform.dtype == torch.float64 or not floor >= 1e-30
    if plain or not (B and S and n_mels and _native.log_mel_supports(n_fft)):
        return log_mel_reference(waveform, lengths_samples, window, filters, hop, floor, out_dtype)
    bins = n_fft // 2 + 1
    x = waveform if waveform.dtype in (torch.float32, torch.int16) else waveform.float()
    window, filters = window.float().contiguous(), filters.float().contiguous()
    check("log_mel", (window, filters), ((n_fft,), (bins, n_mels)))
    lengths = lengths_of(lengths_samples, x)
    out = torch.empty((B, S // hop + 1, n_mels), dtype=torch.float32)
    call(
        "log_mel",
        matrix_of(x),
        x.dtype == torch.int16,
        lengths.data_ptr(),
        (window.data_ptr(), filters.data_ptr(), n_fft, n_mels, hop, floor),
        out.data_ptr(),
    )
    return out.to(out_dtype)


def waveform_conv(
    x: Tensor, taps: Tensor, bias: Tensor, ends: Tensor, last: Tensor, stride: int
) -> Tensor:
    """Strided convolution of one channel, in float32, less the ends."""
    if not _is_float32(x, taps, bias):
        return waveform_conv_reference(x, taps, bias, ends, last, stride)
    check("waveform_conv", (bias,), ((taps.shape[0],),))
    x, taps, bias = x.contiguous(), taps.contiguous(), bias.contiguous()
    out = x.new_empty((len(x), (x.shape[1] - taps.shape[1]) // stride + 1, len(taps)))
    addresses = (x.data_ptr(), taps.data_ptr(), bias.data_ptr(), out.data_ptr())
    call("waveform_conv", _waveform_shape(x, taps, stride), *addresses)
    return take_off(out, ends, last)


def waveform_conv_backward(
    grad: Tensor, x: Tensor, taps: Tensor, last: Tensor, stride: int, with_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of taps, bias and ends, in float32; with that of x all by torch."""
    if with_x or not _is_float32(x, taps):
        return waveform_conv_backward_reference(grad, x, taps, last, stride, with_x)
    B, _, n_frames, *_, C = _waveform_shape(x, taps, stride)
    check("waveform_conv", (grad,), ((B, n_frames, C),))
    grad, x = grad.contiguous(), x.contiguous()
    d_taps = torch.empty_like(taps, memory_format=torch.contiguous_format)
    d_bias = taps.new_empty(len(taps))
    addresses = (x.data_ptr(), grad.data_ptr(), d_taps.data_ptr(), d_bias.data_ptr())
    call("waveform_conv_backward", _waveform_shape(x, taps, stride), *addresses)
    return x.new_empty(0), d_taps, d_bias, of_ends(grad, last)


def _waveform_shape(x: Tensor, taps: Tensor, stride: int) -> tuple[int, ...]:
    (B, S), (C, K) = x.shape, taps.shape
    return B, S, (S - K) // stride + 1, stride, K, C


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
    if not _is_float32(*tensors):
        return residual_unit_reference(*tensors, lengths_frames, dilation, keep_hidden, narrow)
    check("residual_unit", tensors[1:], _residual_shapes(x))
    x, *parameters = (t.contiguous() for t in tensors)
    out = torch.empty_like(x)
    hidden = torch.empty_like(x) if keep_hidden else x.new_empty(0)
    lengths = lengths_of(lengths_frames, x)
    call(
        "residual_unit",
        (*x.shape, dilation, address_of(lengths), narrow),
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
    if not _is_float32(x, *tensors[3:]):
        return residual_unit_backward_reference(*tensors, lengths_frames, dilation, narrow)
    shapes = (x.shape, x.shape, *_residual_shapes(x))
    check("residual_unit", (grad, hidden, *tensors[3:]), shapes)
    grad, x, hidden, *parameters = (t.contiguous() for t in tensors)
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    lengths = lengths_of(lengths_frames, x)
    call(
        "residual_unit_backward",
        (*x.shape, dilation, address_of(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        hidden.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def _residual_shapes(x: Tensor, *n_units: int) -> tuple[tuple[int, ...], ...]:
    """Of the parameters of one unit, or of several, for x (B, T, C)."""
    _, _, C = x.shape
    return ((*n_units, C, C, 3), (*n_units, C)) * 2


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
    if x.shape[2] not in CHANNELS or not _is_float32(*tensors):
        return residual_block_reference(*tensors, lengths_frames, dilations, narrow)
    check("residual_block", tensors[1:], _residual_shapes(x, len(dilations)))
    x, *parameters = (t.contiguous() for t in tensors)
    out, lengths = torch.empty_like(x), lengths_of(lengths_frames, x)
    call(
        "residual_block",
        (*x.shape, list(dilations), address_of(lengths), narrow),
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
    if x.shape[2] not in CHANNELS or not _is_float32(*tensors[1:]):
        return residual_block_backward_reference(*tensors, lengths_frames, dilations, narrow)
    check("residual_block", (grad, *tensors[2:]), (x.shape, *_residual_shapes(x, len(dilations))))
    grad, x, *parameters = (t.contiguous() for t in tensors)
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    lengths = lengths_of(lengths_frames, x)
    call(
        "residual_block_backward",
        (*x.shape, list(dilations), address_of(lengths), narrow),
        tuple(p.data_ptr() for p in parameters),
        x.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def snake(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """x + sin(a x)^2 / a of float32 or bfloat16, in float32."""
    if not _is_snake(x, a):
        return snake_reference(x, a, lengths_frames)
    check("snake", (a,), ((x.shape[2],),))
    x, a, lengths = x.contiguous(), a.contiguous(), lengths_of(lengths_frames, x)
    out = torch.empty_like(x, dtype=torch.float32)
    call(
        "snake",
        (*x.shape, address_of(lengths)),
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
    x, a, lengths = x.contiguous(), a.contiguous(), lengths_of(lengths_frames, x)
    grad = grad.float().contiguous()
    check("snake", (grad, a), (x.shape, (x.shape[2],)))
    out = torch.empty_like(x), torch.empty_like(a)
    call(
        "snake_backward",
        (*x.shape, address_of(lengths)),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        a.data_ptr(),
        grad.data_ptr(),
        *(o.data_ptr() for o in out),
    )
    return out


def _is_snake(x: Tensor, a: Tensor) -> bool:
    """Frames (B, T, C), whose channels fill the vectors of every instruction set."""
    types = x.ndim == 3 and x.dtype in (torch.float32, torch.bfloat16) and a.dtype == torch.float32
    return types and x.numel() > 0 and x.shape[2] % 16 == 0


def density_attention(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
) -> Tensor:
    """x + x softmax(log-density) over time, in float32."""
    if not _is_density(x):
        return density_attention_reference(x, offsets, squared_widths, lengths_frames)
    x, *parameters = (t.float().contiguous() for t in (x, offsets, squared_widths))
    check("density_attention", parameters, _GAUSSIANS)
    out, lengths = torch.empty_like(x), lengths_of(lengths_frames, x)
    call(
        "density_attention",
        (*x.shape, address_of(lengths)),
        *(p.data_ptr() for p in parameters),
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
    tensors = (x, offsets, squared_widths)
    grad, x, *parameters = (t.float().contiguous() for t in (grad, *tensors))
    check("density_attention", (grad, *parameters), (x.shape, *_GAUSSIANS))
    out = tuple(torch.empty_like(t) for t in (x, *parameters))
    lengths = lengths_of(lengths_frames, x)
    call(
        "density_attention_backward",
        (*x.shape, address_of(lengths)),
        *(p.data_ptr() for p in parameters),
        x.data_ptr(),
        grad.data_ptr(),
        *(o.data_ptr() for o in out),
    )
    return tuple(o.to(t.dtype) for o, t in zip(out, tensors))


_GAUSSIANS = ((CHUNKS, GAUSSIANS),) * 2


def _is_density(x: Tensor) -> bool:
    """Float32 (B, T, C) with channels that fill the vectors of every instruction set."""
    fits = x.ndim == 3 and x.dtype == torch.float32
    return fits and x.numel() > 0 and x.shape[2] % 16 == 0


def _is_float32(*tensors: Tensor) -> bool:
    """Float32, and at least one value each."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors)


if instruction_sets():
    _log_mel.register_kernel("cpu")(log_mel)
    _waveform_conv.register_kernel("cpu")(waveform_conv)
    _waveform_conv_backward.register_kernel("cpu")(waveform_conv_backward)
    _density_attention.register_kernel("cpu")(density_attention)
    _density_attention_backward.register_kernel("cpu")(density_attention_backward)
    _block.register_kernel("cpu")(residual_block)
    _block_backward.register_kernel("cpu")(residual_block_backward)
    _unit.register_kernel("cpu")(residual_unit)
    _unit_backward.register_kernel("cpu")(residual_unit_backward)
    _snake.register_kernel("cpu")(snake)
    _snake_backward.register_kernel("cpu")(snake_backward)
