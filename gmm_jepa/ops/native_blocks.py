"""The native module's kernels of a conformer block's parts on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.convolution_module import (
    _convolution_module,
    _convolution_module_backward,
    convolution_module_backward_reference,
    convolution_module_reference,
    convolution_module_shapes,
)
from gmm_jepa.ops.feed_forward import (
    _feed_forward,
    _feed_forward_backward,
    check_hidden,
    feed_forward_backward_reference,
    feed_forward_reference,
    feed_forward_shapes,
)
from gmm_jepa.ops.fused import MAP_MULTIPLE, RUN_MULTIPLE
from gmm_jepa.ops.native import (
    address_of,
    call,
    check,
    drawn_by,
    instruction_sets,
    lengths_of,
    multiplies_bfloat16,
)
from gmm_jepa.ops.self_attention import (
    _self_attention,
    _self_attention_backward,
    self_attention_backward_reference,
    self_attention_reference,
    self_attention_shapes,
)
from gmm_jepa.ops.strided import (
    _strided,
    _strided_backward,
    strided_backward,
    strided_forward,
)


def feed_forward(
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
    """The feed-forward of x, and what its first map made, rounded if `narrow`."""
    parameters = (up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias)
    if not _is_feed_forward(x, parameters):
        return feed_forward_reference(
            x, *parameters, seed, scale, epsilon, dropout_p, keep_hidden, narrow
        )
    check("feed_forward", parameters, feed_forward_shapes(x, up_bias))
    x, (H, D) = x.contiguous(), up_weight.shape
    parameters = tuple(None if p is None else p.contiguous() for p in parameters)
    rounds = narrow and multiplies_bfloat16()
    shape = (*x.shape[:-1], H) if keep_hidden else (0,)
    hidden = x.new_empty(shape, dtype=_kept(rounds))
    out = torch.empty_like(x)
    call(
        "feed_forward",
        (x.numel() // D, D, H, scale, epsilon, rounds, drawn_by(seed, dropout_p)),
        tuple(map(address_of, parameters)),
        x.data_ptr(),
        hidden.data_ptr() if keep_hidden else 0,
        out.data_ptr(),
    )
    return out, hidden.to(_kept(narrow))


def feed_forward_backward(
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
    """Gradients of x, weights and biases of `feed_forward`; (0,) of a norm that there is not."""
    parameters = (up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias)
    if not _is_feed_forward(x, parameters):
        return feed_forward_backward_reference(
            grad, x, hidden, *parameters, seed, scale, epsilon, dropout_p, narrow
        )
    check_hidden(x, hidden, up_bias)
    check("feed_forward", (grad, *parameters), (x.shape, *feed_forward_shapes(x, up_bias)))
    rounds = narrow and multiplies_bfloat16()
    grad, x, hidden = (t.contiguous() for t in (grad, x, hidden.to(_kept(rounds))))
    parameters = tuple(None if p is None else p.contiguous() for p in parameters)
    out = tuple(x.new_empty((0,) if t is None else t.shape) for t in (x, *parameters))
    H, D = up_weight.shape
    call(
        "feed_forward_backward",
        (x.numel() // D, D, H, scale, epsilon, rounds, drawn_by(seed, dropout_p)),
        tuple(map(address_of, parameters)),
        x.data_ptr(),
        hidden.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out


def _is_feed_forward(x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    """Float32, widths that fill panels and tiles, and a norm with both parameters or none."""
    given = [p for p in parameters if p is not None]
    return len(given) % 2 == len(parameters[1]) % MAP_MULTIPLE == 0 and _fits_maps(x, *given)


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
    seed: Tensor | None,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The self-attention of x, and what its gradient needs."""
    tensors = (x, qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    if not _is_self_attention(*tensors):
        return self_attention_reference(*tensors, lengths_frames, seed, dropout_p, narrow)
    check("self_attention", tensors[1:], self_attention_shapes(x, gate_scale))
    x, *weights = (t.contiguous() for t in tensors)
    (B, T, D), H, rounds = x.shape, len(gate_scale), narrow and multiplies_bfloat16()
    made, lengths = torch.empty_like(x), lengths_of(lengths_frames, x)
    kept = tuple(x.new_empty(s) for s in ((B, T, 3 * D), (B, T, D), (B, H, T), (B, H, T)))
    call(
        "self_attention",
        (B, T, H, D, address_of(lengths), rounds, drawn_by(seed, dropout_p)),
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
    seed: Tensor | None,
    dropout_p: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the weights of `self_attention`."""
    kept = (made, attended, log_sum, gate)
    weights = (qkv, qkv_bias, out, out_bias, table, gate_u, gate_r, gate_scale)
    if not _is_self_attention(x, *weights):
        return self_attention_backward_reference(
            grad, x, *kept, *weights, lengths_frames, seed, dropout_p, narrow
        )
    (B, T, D), H, rounds = x.shape, len(gate_scale), narrow and multiplies_bfloat16()
    check("self_attention", weights, self_attention_shapes(x, gate_scale))
    check("self_attention", (grad, *kept), (x.shape, (B, T, 3 * D), x.shape, *((B, H, T),) * 2))
    grad, x, *rest = (t.contiguous() for t in (grad, x, *kept, *weights))
    kept, weights = rest[:4], rest[4:]
    gradients = tuple(torch.empty_like(t) for t in (x, *weights))
    lengths = lengths_of(lengths_frames, x)
    call(
        "self_attention_backward",
        (B, T, H, D, address_of(lengths), rounds, drawn_by(seed, dropout_p)),
        tuple(w.data_ptr() for w in weights),
        x.data_ptr(),
        tuple(t.data_ptr() for t in kept),
        grad.data_ptr(),
        tuple(g.data_ptr() for g in gradients),
    )
    return gradients


def _is_self_attention(x: Tensor, *weights: Tensor) -> bool:
    """Float32, widths that fill panels and tiles, and heads that fill vectors."""
    return weights[-2].shape[1] % RUN_MULTIPLE == 0 and _fits_maps(x, *weights)


def convolution_module(
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
    """The convolution module of x, and what its gradient needs."""
    of_norms_and_maps = (norm_in, norm_in_bias, up, up_bias)
    tensors = (x, *of_norms_and_maps, taps, taps_bias, norm_out, norm_out_bias, down, down_bias)
    if not _fits_maps(*tensors):
        return convolution_module_reference(
            *tensors, lengths_frames, seed, epsilon, dropout_p, narrow
        )
    check("convolution_module", tensors[1:], convolution_module_shapes(x, taps))
    x, *weights = (t.contiguous() for t in tensors)
    (B, T, D), rounds = x.shape, narrow and multiplies_bfloat16()
    out, lengths = torch.empty_like(x), lengths_of(lengths_frames, x)
    made = x.new_empty((B, T, 2 * D), dtype=_kept(rounds))
    kept = (made, torch.empty_like(x), x.new_empty((B, 4)))
    call(
        "convolution_module",
        (B, T, D, taps.shape[-1], address_of(lengths), epsilon, rounds, drawn_by(seed, dropout_p)),
        tuple(w.data_ptr() for w in weights),
        x.data_ptr(),
        tuple(t.data_ptr() for t in kept),
        out.data_ptr(),
    )
    return out, made.to(_kept(narrow)), *kept[1:]


def convolution_module_backward(
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
    """Gradients of x and the weights of `convolution_module`."""
    kept = (made, convolved, statistics)
    of_norms_and_maps = (norm_in, norm_in_bias, up, up_bias)
    weights = (*of_norms_and_maps, taps, taps_bias, norm_out, norm_out_bias, down, down_bias)
    if not _fits_maps(x, *weights):
        return convolution_module_backward_reference(
            grad, x, *kept, *weights, lengths_frames, seed, dropout_p, narrow
        )
    (B, T, D), rounds = x.shape, narrow and multiplies_bfloat16()
    made = made.to(_kept(rounds))
    check("convolution_module", weights, convolution_module_shapes(x, taps))
    check("convolution_module", (grad, *kept[1:]), (x.shape, x.shape, (B, 4)))
    check("convolution_module", (made,), ((B, T, 2 * D),), _kept(rounds))
    kept = (made, convolved, statistics)
    grad, x, *rest = (t.contiguous() for t in (grad, x, *kept, *weights))
    kept, weights = rest[:3], rest[3:]
    gradients = tuple(torch.empty_like(t) for t in (x, *weights))
    lengths = lengths_of(lengths_frames, x)
    call(
        "convolution_module_backward",
        (B, T, D, taps.shape[-1], address_of(lengths), 0.0, rounds, drawn_by(seed, dropout_p)),
        tuple(w.data_ptr() for w in weights),
        x.data_ptr(),
        tuple(t.data_ptr() for t in kept),
        grad.data_ptr(),
        tuple(g.data_ptr() for g in gradients),
    )
    return gradients


def strided_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, narrow: bool) -> Tensor:
    """Convolution of frames with stride s and 2 s taps, in float32."""
    if not _is_strided(x, weight) or bias.dtype != torch.float32:
        return strided_forward(x, weight, bias, stride, narrow)
    check("strided_conv", (weight, bias), _strided_weight_shapes(x, weight, stride))
    x, bias, taps = x.contiguous(), bias.contiguous(), weight.mT.contiguous()
    shape, out = _strided_shape(x, weight, stride, narrow), x.new_empty(_made(x, weight, stride))
    call("strided_conv", shape, x.data_ptr(), taps.data_ptr(), bias.data_ptr(), out.data_ptr())
    return out


def strided_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of `strided_conv`."""
    if not _is_strided(x, weight):
        return strided_backward(grad, x, weight, stride, narrow)
    of_weight, _ = _strided_weight_shapes(x, weight, stride)
    check("strided_conv", (grad, weight), (_made(x, weight, stride), of_weight))
    grad, x, taps = grad.contiguous(), x.contiguous(), weight.mT.contiguous()
    out = torch.empty_like(x), torch.empty_like(taps), taps.new_empty(len(taps))
    call(
        "strided_conv_backward",
        _strided_shape(x, weight, stride, narrow),
        x.data_ptr(),
        taps.data_ptr(),
        grad.data_ptr(),
        tuple(o.data_ptr() for o in out),
    )
    return out[0], out[1].mT.contiguous(), out[2]


def _made(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int]:
    """Shape of what comes of a strided convolution."""
    return len(x), (x.shape[1] + 2 * (stride // 2)) // stride - 1, len(weight)


def _strided_weight_shapes(x: Tensor, weight: Tensor, stride: int) -> tuple[tuple[int, ...], ...]:
    return (len(weight), x.shape[2], 2 * stride), (len(weight),)


def _strided_shape(x: Tensor, weight: Tensor, stride: int, narrow: bool) -> tuple:
    return (*x.shape, len(weight), stride, narrow and multiplies_bfloat16())


def _is_strided(x: Tensor, weight: Tensor) -> bool:
    """Float32, and as many outputs, and values that each sees, as fill panels and tiles."""
    fits = len(weight) % MAP_MULTIPLE == weight[0].numel() % MAP_MULTIPLE == 0
    fits = fits and x.ndim == 3 and x.shape[2] % RUN_MULTIPLE == 0
    return fits and x.numel() > 0 and x.dtype == weight.dtype == torch.float32


def _kept(narrow: bool) -> torch.dtype:
    """Of what a map made and the gradient needs."""
    return torch.bfloat16 if narrow else torch.float32


def _fits_maps(x: Tensor, *weights: Tensor) -> bool:
    """Float32, and a width that fills panels and tiles."""
    fits = x.numel() > 0 and x.shape[-1] % MAP_MULTIPLE == 0
    return fits and all(t.dtype == torch.float32 for t in (x, *weights))


if instruction_sets():
    _strided.register_kernel("cpu")(strided_conv)
    _strided_backward.register_kernel("cpu")(strided_conv_backward)
    _convolution_module.register_kernel("cpu")(convolution_module)
    _convolution_module_backward.register_kernel("cpu")(convolution_module_backward)
    _self_attention.register_kernel("cpu")(self_attention)
    _self_attention_backward.register_kernel("cpu")(self_attention_backward)
    _feed_forward.register_kernel("cpu")(feed_forward)
    _feed_forward_backward.register_kernel("cpu")(feed_forward_backward)
