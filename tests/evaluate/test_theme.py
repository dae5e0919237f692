"""Pictures keep the theme's colours, and clusters get colours that can be told apart."""

from __future__ import annotations

import io

import numpy as np
import pytest

from gmm_jepa.evaluate.theme import DARK, LIGHT, Theme, cluster_colors, new_figure, style, to_png


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_paper_and_lines_are_exact_beside_a_heatmap(theme: Theme) -> None:
    image = pytest.importorskip("PIL.Image")

    def draw() -> bytes:
        figure = new_figure(2, 2)
        above, below = figure.subplots(2, 1)
        above.imshow(np.random.default_rng(0).random((40, 40)), cmap="viridis")
        below.plot([0, 1], [1, 1], color=theme.blue, linewidth=4)
        return to_png(figure, theme)

    with style(theme):
        png = draw()
        assert png == draw()
    picture = np.asarray(image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    present = {"#" + bytes(color).hex() for color in np.unique(picture, axis=0)}
    assert {theme.paper, theme.blue} <= present
    assert len(present) <= 256
    assert "#" + bytes(picture[0]).hex() == theme.paper


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
