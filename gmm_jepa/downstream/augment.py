"""SpecAugment (Park et al., 2019) on features: a time warp, masks over frames and over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.downstream.settings import AugmentSettings


class SpecAugment:
    """Every row of a batch is warped and masked by itself, within its real frames; zeros fill.

    Args:
        settings: how much.
        seed: of the draws.
    """

    def __init__(self, settings: AugmentSettings, seed: int) -> None:
        self.settings = settings
        self._draws = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Features (B, T, D), lengths (B,) -> the same, changed; the argument is left alone."""
        s = self.settings
        rows = []
        for row, n in zip(x, lengths.tolist()):
            warped = self._warp(row[:n])
            keep_frames = self._mask(n, s.time_masks, s.time_mask_frames)
            keep_channels = self._mask(x.shape[2], s.channel_masks, s.channel_mask_width)
            keep = keep_frames[:, None] & keep_channels
            rows.append(F.pad(warped * keep.to(x.device), (0, 0, 0, x.shape[1] - n)))
        return torch.stack(rows)

    def _warp(self, row: Tensor) -> Tensor:
        """Move one frame of (T, D); both sides are stretched or squeezed to fit."""
        window, n = self.settings.time_warp_frames, len(row)
        if window == 0 or n - window <= window:
            return row
        centre = self._draw(window, n - window)
        moved = self._draw(centre - window, centre + window) + 1
        if not 0 < moved < n:
            return row
        return torch.cat([_stretch(row[:centre], moved), _stretch(row[centre:], n - moved)])

    def _mask(self, n: int, n_masks: int, longest: int) -> Tensor:
        """(n,) bool, False under a mask."""
        keep = torch.ones(n, dtype=torch.bool)
        limit = min(longest, int(self.settings.mask_share * n) + 1)
        for _ in range(n_masks):
            length = self._draw(0, limit)
            start = self._draw(0, max(1, n - length))
            keep[start : start + length] = False
        return keep

    def _draw(self, low: int, high: int) -> int:
        """An integer in [low, high)."""
        return int(torch.randint(low, high, (), generator=self._draws))


def _stretch(row: Tensor, n: int) -> Tensor:
    """(T, D) to (n, D) by bicubic interpolation over time."""
    made = F.interpolate(row[None, None], (n, row.shape[1]), mode="bicubic", align_corners=False)
    return made[0, 0]
