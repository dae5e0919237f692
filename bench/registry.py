"""Every case there is, for the table, for pytest-benchmark and for tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.block_cases import convolution_module, feed_forward, front_end, self_attention
from bench.cases import (
    Case,
    em_statistics,
    ema_update,
    gmm_argmax,
    gmm_log_likelihood,
    gmm_posterior,
    gmm_posterior_exact,
    log_mel,
)
from bench.encoder_cases import (
    STAGES,
    attention_with_dropout,
    density_attention,
    density_layer,
    depthwise_conv,
    dropout,
    gated_bias_attention,
    linear,
    residual_layer,
    residual_unit,
    snake,
    snake_layer,
    strided_conv,
)
from bench.loss_cases import (
    masked_cross_entropy,
    masked_kl,
    masked_kl_ensemble,
    masked_kl_targets,
    masked_mse,
)
from bench.shapes import Shape
from gmm_jepa.ops import fused
from gmm_jepa.ops.native import multiplies_bfloat16

IN_BOTH_TYPES = (
    log_mel,
    gmm_posterior,
    masked_kl,
    masked_kl_ensemble,
    masked_kl_targets,
    masked_cross_entropy,
    masked_mse,
    gated_bias_attention,
    attention_with_dropout,
    depthwise_conv,
)
EVERYWHERE = (
    *IN_BOTH_TYPES,
    gmm_posterior_exact,
    gmm_log_likelihood,
    gmm_argmax,
    em_statistics,
    ema_update,
)
ON_CPUS = (residual_unit, snake, density_attention, dropout, linear)
"""Elsewhere plain torch does these, or layers of the default conformer's front end."""
IN_BFLOAT16 = (feed_forward, self_attention, convolution_module, front_end)
"""On CPUs that multiply bfloat16."""
ON_CUDA = (strided_conv, partial(strided_conv, dtype=torch.bfloat16))
"""On CPUs part of the front end below."""
UNPROVEN = (
    *(partial(residual_layer, stage=STAGES[0], dilation=d) for d in (1, 25, 125)),
    *(partial(residual_layer, stage=stage, dilation=25) for stage in STAGES[1:]),
    *(partial(make, stage=stage) for make in (snake_layer, density_layer) for stage in STAGES),
)
"""On CUDA, by kernels that have not run on a GPU yet: where `fused.uses_unproven` asks for them."""


Maker = Callable[[Shape], Case]


def makers(device: str) -> dict[str, Maker]:
    """What makes each case that there is on a device, of a shape; by names that tell them apart."""
    found = [partial(make, device=device) for make in EVERYWHERE]
    if device == "cpu":
        found += [partial(make, device=device) for make in ON_CPUS]
        if multiplies_bfloat16():
            found += [partial(make, device=device) for make in IN_BFLOAT16]
    if device == "cuda":
        found += [partial(make, device=device) for make in ON_CUDA]
        found += [partial(make, device=device, dtype=torch.bfloat16) for make in IN_BOTH_TYPES]
        if fused.uses_unproven and fused.has_triton:
            found += [partial(make, device=device) for make in UNPROVEN]
    return {_name_of(make): make for make in found}


def _name_of(make: partial) -> str:
    settings = {name: value for name, value in make.keywords.items() if name != "device"}
    return " ".join([make.func.__name__, *(f"{name}={value}" for name, value in settings.items())])
