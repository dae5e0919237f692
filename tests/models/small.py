"""A conformer small enough for a test, and batches for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gmm_jepa.models import ConformerConfig, TransformerConfig

SMALL = ConformerConfig(
    channels=(4, 6, 8, 10),
    residual_blocks=2,
    code_dim=16,
    layers=2,
    heads=2,
    conv_kernel=7,
    daam=False,
    relative_bias=False,
    dropout=0.0,
)
TRANSFORMER = TransformerConfig(
    conv_dim=6, code_dim=16, layers=2, heads=2, ffn_dim=24, dropout=0.0, unit_rms=True
)
FULL = replace(SMALL, daam=True, relative_bias=True, unit_rms=True)


def ragged_batch(lengths: list[int], *, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Noise (B, S) whose rows end after `lengths` samples, and go on as `padding`."""
    waveform = torch.full((len(lengths), max(lengths)), padding)
    for row, n in zip(waveform, lengths):
        row[:n] = 0.1 * torch.randn(n)
    return waveform, torch.tensor(lengths)


def shake(module: nn.Module, scale: float = 0.2) -> Any:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter) * parameter.abs().mean().clamp(0.1))
    return module
