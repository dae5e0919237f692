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

from gmm_jepa.models.padding import FrameMask, at_least_float32

CHUNKS = 4
GAUSSIANS = 4
MIN_FRAMES = 2 * CHUNKS
"""Below this many real frames a row passes unchanged."""

_HIDDEN = -1e30
"""Log-density of slots without a frame: finite, so that a chunk of none has finite gradients."""


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
        if x.shape[1] < MIN_FRAMES:
            return x
        wide = at_least_float32(x)
        if mask is None:
            return self._whole(wide).to(x.dtype)
        return self._ragged(wide, mask).to(x.dtype)

    def _whole(self, x: Tensor) -> Tensor:
        n_frames = x.shape[1]
        size = n_frames // CHUNKS
        chunks = x.split([size] * (CHUNKS - 1) + [n_frames - (CHUNKS - 1) * size], dim=1)
        weights = [
            density_weights(chunk, offsets, widths)
            for chunk, offsets, widths in zip(chunks, self.offsets, self.widths)
        ]
        return x + x * torch.cat(weights, dim=1)

    def _ragged(self, x: Tensor, mask: FrameMask) -> Tensor:
        """Each row is dealt out to 4 chunks of equal room, weighed, and dealt back."""
        size = (mask.lengths // CHUNKS)[:, None]  # (B, 1), frames of all chunks but the last
        room = x.shape[1] // CHUNKS + CHUNKS - 1  # no chunk is longer
        slots = torch.arange(room, device=x.device)
        frames = torch.arange(x.shape[1], device=x.device)
        weights = torch.zeros_like(x)
        for chunk, (offsets, widths) in enumerate(zip(self.offsets, self.widths)):
            start = chunk * size
            stop = start + size if chunk < CHUNKS - 1 else mask.lengths[:, None]
            index = (start + slots).clamp(max=x.shape[1] - 1)  # (B, room)
            taken = start + slots < stop
            dealt = x.gather(1, _over_channels(index, x))
            weight = density_weights(dealt, offsets, widths, taken[..., None])
            back = (frames - start).clamp(0, room - 1)
            inside = (frames >= start) & (frames < stop)
            returned = weight.gather(1, _over_channels(back, x))
            weights = torch.where(inside[..., None], returned, weights)
        long_enough = (mask.lengths >= MIN_FRAMES)[:, None, None]
        return torch.where(long_enough, x + x * weights, x)


def density_weights(
    chunk: Tensor, offsets: Tensor, widths: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Softmax over time of the summed log-densities of one chunk, up to their constants.

    Args:
        chunk: (B, T, C) float32 or float64.
        offsets: (G,) means of the Gaussians, relative to the chunk's mean.
        widths: (G,) their standard deviations, in units of the chunk's.
        valid: (B, T, 1) bool, frames that exist; None: all. Others get weight zero.

    Returns:
        (B, T, C), positive, summing to one over the chunk's real frames.
    """
    if valid is None:
        mean = chunk.mean(dim=1, keepdim=True)
        variance = chunk.var(dim=1, keepdim=True)
    else:
        count = valid.sum(dim=1, keepdim=True)
        mean = chunk.masked_fill(~valid, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
        centred = (chunk - mean).masked_fill(~valid, 0)
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    std = (variance + 1e-8).sqrt()
    log_density = torch.zeros_like(chunk)
    for offset, width in zip(offsets, widths):
        y = ((chunk - (mean + offset)) / std).clamp(-10.0, 10.0)
        c2 = width.clamp(0.01, 10.0).square() + 1e-8
        log_density = log_density - y.square() / (2 * c2)
    if valid is not None:
        log_density = log_density.masked_fill(~valid, _HIDDEN)
    return log_density.softmax(dim=1)


def _over_channels(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[2])
