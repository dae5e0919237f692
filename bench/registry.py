"""Every case there is, for the table, for pytest-benchmark and for tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
    attention_with_dropout,
    density_attention,
    depthwise_conv,
    dropout,
    gated_bias_attention,
    residual_unit,
)
from bench.loss_cases import (
    masked_cross_entropy,
    masked_kl,
    masked_kl_ensemble,
    masked_kl_targets,
    masked_mse,
)
from bench.shapes import Shape

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
ON_CPUS = (residual_unit, density_attention, dropout)
"""Elsewhere plain torch does these."""


def makers(shape: Shape, device: str) -> list[Callable[[], Case]]:
    """Functions that make each case of a shape."""
    made = [lambda make=make: make(shape, device) for make in EVERYWHERE]
    if device == "cpu":
        made += [lambda make=make: make(shape, device) for make in ON_CPUS]
    if device == "cuda":
        half = torch.bfloat16
        made += [lambda make=make: make(shape, device, half) for make in IN_BOTH_TYPES]
    return made
