"""Colours of clusters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.report.theme import Theme


def cluster_colors(places: NDArray[np.float64], theme: Theme) -> NDArray[np.float64]:
    """A colour for each cluster, so that clusters that sound alike look alike.

    Args:
        places: (K, 3) the clusters' means on three axes, loudness first. Every axis is replaced by
            ranks, so that colours are used evenly. Loudness gives the distance from the paper, the
            angle on the other two the hue, their distance from the middle the chroma.
        theme: decides whether the paper is light or dark.

    Returns:
        (K, 3) sRGB, each in [0, 1].
    """
    ranks = np.argsort(np.argsort(places, axis=0, kind="stable"), axis=0, kind="stable")
    loud, x, y = (2 * ranks / max(len(places) - 1, 1) - 1).T
    lightness = 0.68 + 0.17 * loud if theme.is_dark else 0.70 - 0.19 * loud
    chroma = 0.03 + 0.085 * np.maximum(np.abs(x), np.abs(y))
    return _oklch(lightness, chroma, np.arctan2(y, x))


def _oklch(
    lightness: NDArray[np.float64], chroma: NDArray[np.float64], hue: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Oklab colours in polar form as sRGB (Ottosson, 2020): equal steps look equal."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    to_cones = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ (to_cones @ lab) ** 3, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).T
