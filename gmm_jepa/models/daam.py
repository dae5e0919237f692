"""Density-adaptive attention over time (DAAM) as a layer, see `gmm_jepa.ops.density`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.padding import FrameMask
from gmm_jepa.ops.density import CHUNKS, GAUSSIANS


class DensityAttention(nn.Module):
    """DAAM over frame-major (B, T, C); computed in float32 at least.

    Widths start log-normal: four Gaussians alike would get the same gradient and stay alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(CHUNKS, GAUSSIANS))
        self.widths = nn.Parameter(torch.randn(CHUNKS, GAUSSIANS).exp())

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """x (B, T, C), padding zero -> the same shape and dtype, padding zero."""
        squared_widths = self.widths.clamp(0.01, 10.0).square() + 1e-8
        lengths = None if mask is None else mask.lengths
        return ops.density_attention(x, self.offsets, squared_widths, lengths_frames=lengths)
