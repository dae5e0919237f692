"""Density-adaptive attention over time (DAAM).

The real frames of a channel are cut into 4 consecutive chunks of T // 4 (the last takes the
rest). In a chunk, with offsets o_g and widths c_g of its own for g = 1..4:

    m, v  = mean and unbiased variance over the chunk's time, std = sqrt(v + 1e-8)
    y_g   = clamp((x - (m + o_g)) / std, -10, 10)
    c     = clamp(c_g, 0.01, 10),  c2 = c^2 + 1e-8
    L     = sum_g -y_g^2 / (2 c2)
    out   = x + x * softmax_time(L)

The published L carries each Gaussian's normaliser as well, and its softmax is exp(L - logsumexp L).
The normalisers are constant over time and cancel; in silent channels, where L reaches -1e5, the
subtraction loses 5 of 16 digits (so measured in float64, in the gradients) and softmax none.

Below 8 frames the unbiased variance of a chunk is undefined (a chunk of one frame) or the chunk
is empty: there DAAM is the identity. y_g is rounded in the published order, which shows in single
gradients of silent channels (std about 2e-3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.padding import FrameMask, at_least_float32
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
        wide = at_least_float32(x)
        return ops.density_attention(wide, self.offsets, squared_widths, lengths_frames=lengths).to(
            x.dtype
        )
