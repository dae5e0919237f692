"""What `torch.utils.flop_counter` says of this package's operators, by the shapes of inputs.

Matrix products and convolutions alone, of a gradient twice those of the operator: what is computed
once more is left out. `gmm_jepa.flops` hands them over.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _residual_unit(x_shape) -> int:
    return 12 * math.prod(x_shape) * x_shape[2]


BY_OUTPUT = ("waveform_conv", "strided_conv")
"""Whose formulas ask for the shape of the output, too."""

FORMULAS: dict[str, Callable[..., int]] = {}
"""By the operator's name under ``gmm_jepa::``."""


def _of(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def register(formula: Callable[..., int]) -> Callable[..., int]:
        FORMULAS[name] = formula
        return formula

    return register


@_of("residual_unit")
def _(x_shape, *_, **__) -> int:
    return _residual_unit(x_shape)


@_of("residual_unit_backward")
def _(x_shape, *_, **__) -> int:
    return 2 * _residual_unit(x_shape)


@_of("gated_bias_attention")
def _(q_shape, *_, **__) -> int:
    return 4 * math.prod(q_shape) * q_shape[2]


@_of("gated_bias_attention_backward")
def _(grad_shape, *_, **__) -> int:
    return 8 * math.prod(grad_shape) * grad_shape[2]  # the scores made again left out


@_of("linear")
def _(x_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@_of("linear_backward")
def _(grad_shape, x_shape, *_, **__) -> int:
    return 4 * math.prod(grad_shape) * x_shape[1]


@_of("depthwise_conv")
def _(x_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[-1]


@_of("depthwise_conv_backward")
def _(grad_shape, _, weight_shape, *__, **___) -> int:
    return 4 * math.prod(grad_shape) * weight_shape[-1]


def _feed_forward(x_shape, up_shape) -> int:
    return 4 * math.prod(x_shape) * up_shape[0]


@_of("feed_forward")
def _(x_shape, up_shape, *_, **__) -> int:
    return _feed_forward(x_shape, up_shape)


@_of("feed_forward_backward")
def _(_, x_shape, __, up_shape, *___, **____) -> int:
    return 2 * _feed_forward(x_shape, up_shape)


def _self_attention(x_shape) -> int:
    _, T, D = x_shape
    return math.prod(x_shape) * (8 * D + 4 * T)


@_of("self_attention")
def _(x_shape, *_, **__) -> int:
    return _self_attention(x_shape)


@_of("self_attention_backward")
def _(_, x_shape, *__, **___) -> int:
    return 2 * _self_attention(x_shape)


def _convolution_module(x_shape, taps_shape) -> int:
    return math.prod(x_shape) * (6 * x_shape[2] + 2 * taps_shape[-1])


@_of("convolution_module")
def _(x_shape, _norm, _norm_bias, _up, _up_bias, taps_shape, *_, **__) -> int:
    return _convolution_module(x_shape, taps_shape)


@_of("convolution_module_backward")
def _(_grad, x_shape, _made, _taps_made, _stats, _n, _nb, _up, _ub, taps_shape, *_, **__) -> int:
    return 2 * _convolution_module(x_shape, taps_shape)


@_of("residual_block")
def _(x_shape, weight_shape, *_, **__) -> int:
    return weight_shape[0] * _residual_unit(x_shape)


@_of("residual_block_backward")
def _(_, x_shape, weight_shape, *__, **___) -> int:
    return 2 * weight_shape[0] * _residual_unit(x_shape)


@_of("waveform_conv")
def _(_, taps_shape, *__, out_shape, **___) -> int:
    return 2 * math.prod(out_shape) * taps_shape[1]


@_of("waveform_conv_backward")
def _(grad_shape, _, taps_shape, _last, _stride, with_x, **__) -> int:
    return (2 + 2 * bool(with_x)) * math.prod(grad_shape) * taps_shape[1]


@_of("strided_conv")
def _(_, weight_shape, *__, out_shape, **___) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


@_of("strided_conv_backward")
def _(grad_shape, _, weight_shape, *__, **___) -> int:
    return 4 * math.prod(grad_shape) * math.prod(weight_shape[1:])
