"""Pictures keep the theme's colours."""

from __future__ import annotations

import io

import numpy as np
import pytest

from gmm_jepa.report.theme import DARK, LIGHT, Theme, new_figure, style, to_png


def test_dollars_are_dollars() -> None:
    with style(LIGHT):
        figure = new_figure(2, 2)
        axes = figure.subplots()
        axes.set_title("$^$ for $5")
        axes.set_yticks([0, 1], ["a_$b", "c_$d"])
        assert to_png(figure, LIGHT)


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
