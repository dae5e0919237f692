"""What `torch.utils.flop_counter` says of this package's operators, by the shapes of inputs.

Matrix products and convolutions alone, of a gradient twice those of the operator: what is computed
once more is left out. Registered when this module is imported.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


def _residual_unit(x_shape) -> int:
    return 12 * math.prod(x_shape) * x_shape[2]


@register_flop_formula(torch.ops.gmm_jepa.residual_unit)
def _(x_shape, *_, **__) -> int:
    return _residual_unit(x_shape)


@register_flop_formula(torch.ops.gmm_jepa.residual_unit_backward)
def _(x_shape, *_, **__) -> int:
    return 2 * _residual_unit(x_shape)


@register_flop_formula(torch.ops.gmm_jepa.gated_bias_attention)
def _(q_shape, *_, **__) -> int:
    return 4 * math.prod(q_shape) * q_shape[2]


@register_flop_formula(torch.ops.gmm_jepa.gated_bias_attention_backward)
def _(grad_shape, *_, **__) -> int:
    return 8 * math.prod(grad_shape) * grad_shape[2]  # the scores made again left out


@register_flop_formula(torch.ops.gmm_jepa.linear)
def _(x_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.gmm_jepa.linear_backward)
def _(grad_shape, x_shape, *_, **__) -> int:
    return 4 * math.prod(grad_shape) * x_shape[1]


@register_flop_formula(torch.ops.gmm_jepa.depthwise_conv)
def _(x_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[-1]


@register_flop_formula(torch.ops.gmm_jepa.depthwise_conv_backward)
def _(grad_shape, _, weight_shape, *__, **___) -> int:
    return 4 * math.prod(grad_shape) * weight_shape[-1]


def _feed_forward(x_shape, up_shape) -> int:
    return 4 * math.prod(x_shape) * up_shape[0]


@register_flop_formula(torch.ops.gmm_jepa.feed_forward)
def _(x_shape, up_shape, *_, **__) -> int:
    return _feed_forward(x_shape, up_shape)


@register_flop_formula(torch.ops.gmm_jepa.feed_forward_backward)
def _(_, x_shape, __, up_shape, *___, **____) -> int:
    return 2 * _feed_forward(x_shape, up_shape)


def _self_attention(x_shape) -> int:
    _, T, D = x_shape
    return math.prod(x_shape) * (8 * D + 4 * T)


@register_flop_formula(torch.ops.gmm_jepa.self_attention)
def _(x_shape, *_, **__) -> int:
    return _self_attention(x_shape)


@register_flop_formula(torch.ops.gmm_jepa.self_attention_backward)
def _(_, x_shape, *__, **___) -> int:
    return 2 * _self_attention(x_shape)


def _convolution_module(x_shape, taps_shape) -> int:
    return math.prod(x_shape) * (6 * x_shape[2] + 2 * taps_shape[-1])


@register_flop_formula(torch.ops.gmm_jepa.convolution_module)
def _(x_shape, _norm, _norm_bias, _up, _up_bias, taps_shape, *_, **__) -> int:
    return _convolution_module(x_shape, taps_shape)


@register_flop_formula(torch.ops.gmm_jepa.convolution_module_backward)
def _(_grad, x_shape, _made, _taps_made, _stats, _n, _nb, _up, _ub, taps_shape, *_, **__) -> int:
    return 2 * _convolution_module(x_shape, taps_shape)


@register_flop_formula(torch.ops.gmm_jepa.residual_block)
def _(x_shape, weight_shape, *_, **__) -> int:
    return weight_shape[0] * _residual_unit(x_shape)


@register_flop_formula(torch.ops.gmm_jepa.residual_block_backward)
def _(_, x_shape, weight_shape, *__, **___) -> int:
    return 2 * weight_shape[0] * _residual_unit(x_shape)


@register_flop_formula(torch.ops.gmm_jepa.waveform_conv)
def _(_, taps_shape, *__, out_shape, **___) -> int:
    return 2 * math.prod(out_shape) * taps_shape[1]


@register_flop_formula(torch.ops.gmm_jepa.waveform_conv_backward)
def _(grad_shape, _, taps_shape, _last, _stride, with_x, **__) -> int:
    return (2 + 2 * bool(with_x)) * math.prod(grad_shape) * taps_shape[1]


@register_flop_formula(torch.ops.gmm_jepa.strided_conv)
def _(_, weight_shape, *__, out_shape, **___) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


@register_flop_formula(torch.ops.gmm_jepa.strided_conv_backward)
def _(grad_shape, _, weight_shape, *__, **___) -> int:
    return 4 * math.prod(grad_shape) * math.prod(weight_shape[1:])
