"""Clusters get colours that can be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from gmm_jepa.evaluate.colors import cluster_colors
from gmm_jepa.report.theme import DARK, LIGHT


@pytest.mark.parametrize("k", [1, 2, 300])
def test_cluster_colors(k: int) -> None:
    places = np.random.default_rng(0).normal(size=(k, 3))
    for theme in (LIGHT, DARK):
        colors = cluster_colors(places, theme)
        assert colors.shape == (k, 3)
        assert ((colors >= 0) & (colors <= 1)).all()
        assert len(np.unique(colors.round(4), axis=0)) == k
    loud = int(places[:, 0].argmax())
    if k == 300:  # the loudest is dark on light paper
        assert cluster_colors(places, LIGHT)[loud].mean() < cluster_colors(places, LIGHT).mean()
