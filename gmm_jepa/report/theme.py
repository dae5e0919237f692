"""How the plots look: one style, once for light pages and once for dark ones."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gmm_jepa.errors import require

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DPI = 160
WIDE_IN, HALF_IN = 10.4, 5.1
"""Widths of figures that fill the page, or stand in pairs."""


@dataclass(frozen=True)
class Theme:
    """Colours; the report's style sheet has the same paper and ink."""

    paper: str
    ink: str
    muted: str
    grid: str
    blue: str
    coral: str
    teal: str
    gold: str
    violet: str
    grey: str
    wash: tuple[str, ...]
    """From nothing to most, for heatmaps and spectrograms."""
    classes: dict[str, str]
    """Of the classes of phones."""

    is_dark: bool = False

    @property
    def own_colors(self) -> tuple[str, ...]:
        """Colours of text and lines."""
        text = (self.paper, self.ink, self.muted, self.grid)
        return (*text, self.blue, self.coral, self.teal, self.gold, self.violet, self.grey)

    @property
    def wheel(self) -> tuple[str, ...]:
        """Colours of what is compared, the strongest first."""
        return (self.coral, self.blue, self.teal, self.gold, self.violet, self.grey)

    @property
    def colormap(self) -> Colormap:
        """`wash` as a colour map."""
        colors = require("matplotlib.colors", extra="train")
        return colors.LinearSegmentedColormap.from_list("wash", self.wash)


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2433",
    muted="#687386",
    grid="#e8ebf0",
    blue="#3b5bdb",
    coral="#e0573e",
    teal="#0c9182",
    gold="#cf9410",
    violet="#8f4fc7",
    grey="#a5adba",
    wash=("#ffffff", "#dfe7fb", "#a9bdf3", "#6580dd", "#3a45a3", "#1d1b52"),
    classes={
        "vowel": "#e0573e",
        "approximant": "#cf9410",
        "nasal": "#0c9182",
        "fricative": "#3b5bdb",
        "affricate": "#5aa9e6",
        "stop": "#8f4fc7",
        "silence": "#b4bbc7",
        "other": "#7d8694",
    },
)

DARK = Theme(
    paper="#181c24",
    ink="#e6e9f0",
    muted="#98a2b4",
    grid="#2a303c",
    blue="#88a2ff",
    coral="#ff8d75",
    teal="#45cdb9",
    gold="#ecc053",
    violet="#c795f5",
    grey="#6c7686",
    wash=("#181c24", "#2a2f63", "#5a48a8", "#a65bb5", "#ee8a8f", "#ffe7b5"),
    classes={
        "vowel": "#ff8d75",
        "approximant": "#ecc053",
        "nasal": "#45cdb9",
        "fricative": "#88a2ff",
        "affricate": "#9bd3ff",
        "stop": "#c795f5",
        "silence": "#59616f",
        "other": "#8b95a5",
    },
    is_dark=True,
)


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Figures made inside look like `theme`; no global setting of matplotlib changes."""
    matplotlib = require("matplotlib", extra="train")
    settings: dict[str, Any] = {
        "figure.facecolor": theme.paper,
        "figure.constrained_layout.use": True,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 8.5,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "text.color": theme.ink,
        "text.parse_math": False,  # names may have dollars
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "image.interpolation": "nearest",
        "image.aspect": "auto",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that belongs to no window and no global state."""
    figures = require("matplotlib.figure", extra="train")
    return figures.Figure(figsize=(width_in, height_in), dpi=DPI)


def to_png(figure: Figure, theme: Theme) -> bytes:
    """The picture as PNG of 256 colours (a third of the size), drawn with Agg.

    The theme's own colours are kept exactly: thin lines must not take on a heatmap's. Figures
    made alike give the same bytes.
    """
    agg = require("matplotlib.backends.backend_agg", extra="train")
    image = require("PIL.Image", extra="train")
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    rgb = np.asarray(canvas.buffer_rgba())[..., :3]
    picture = image.fromarray(np.ascontiguousarray(rgb))
    own = [bytes.fromhex(color[1:]) for color in theme.own_colors]
    found = bytes(picture.quantize(256 - len(own)).getpalette() or ())
    colors = (b"".join(own) + found)[:768]
    palette = image.new("P", (1, 1))
    palette.putpalette(colors)
    places = np.array(picture.quantize(palette=palette, dither=0))
    for place, color in enumerate(own):  # Pillow's search for the nearest colour is not exact
        places[(rgb == np.frombuffer(color, np.uint8)).all(axis=-1)] = place
    indexed = image.fromarray(places)
    indexed.putpalette(colors)
    file = io.BytesIO()
    indexed.save(file, "png", optimize=True, dpi=(DPI, DPI))
    return file.getvalue()
