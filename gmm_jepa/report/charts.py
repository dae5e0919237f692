"""Parts of charts that the reports share: curves over the steps of a training, panels, bars.

Figures are drawn inside `theme.style`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.report.theme import WIDE_IN, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``."""
Points = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values."""

LOSSES = {
    "jepa": "JEPA error",
    "kl": "KL to the targets, nats",
    "cross_entropy": "Cross-entropy to the labels, nats",
    "lambda": "λ, the weight of the targets",
}
METERS = {
    "usage_entropy": "Cluster usage entropy",
    "agreement": "Head agrees with its targets",
    "teacher_cosine": "Cosine of teacher and student",
    "effective_rank": "Effective rank of z",
    "std": "Standard deviation of z",
    "mean_cosine": "Mean pairwise cosine of z",
    "front_end_effective_rank": "Effective rank, front end",
    "front_end_std": "Standard deviation, front end",
    "front_end_mean_cosine": "Mean pairwise cosine, front end",
}
DASHED = (0, (4, 3))
"""Style of lines that mark a level or a moment."""
BAR = 0.66
"""Thickness of a bar, in rows."""
_COLUMNS = 3
_ROW_IN = 2.5
_MANY_POINTS = 40
"""From so many on a curve has a running mean."""


def curve(metrics: Metrics, key: str) -> Points | None:
    """Steps and values of one key, both (N,); None where there are fewer than two.

    Lines without the key, or with null or NaN there, are left out. A meter of the output is found
    with and without the prefix ``online_``.
    """
    points = []
    for line in metrics:
        value = line.get(key, line.get(f"online_{key}"))
        if isinstance(value, (int, float)) and math.isfinite(value) and "step" in line:
            points.append((line["step"], value))
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return (table[:, 0], table[:, 1]) if len(table) >= 2 else None


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) running mean of a twenty-fifth of the points where there are many, else the values."""
    if len(values) < _MANY_POINTS:
        return values
    width = max(3, len(values) // 25) | 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def grid(titles: Sequence[str]) -> tuple[Figure | None, list[Axes]]:
    """Small panels, three in a row, with a step axis below; None without titles."""
    if not titles:
        return None, []
    rows = math.ceil(len(titles) / _COLUMNS)
    figure = new_figure(WIDE_IN, _ROW_IN * rows)
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).reshape(-1))
    figure.get_layout_engine().set(hspace=0.1)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    for i, (axes, title) in enumerate(zip(panels, titles)):
        axes.set_title(title)
        axes.margins(x=0.02, y=0.12)
        if i + _COLUMNS >= len(titles):
            axes.set_xlabel("step")
    return figure, panels[: len(titles)]


def bars(
    axes: Axes,
    theme: Theme,
    rows: Mapping[str, tuple[float, float]],
    colors: Sequence[str],
    label: Callable[[float], str],
) -> None:
    """A bar a row (name -> value and error) and, past its error, the value as `label` says it."""
    values, errors = np.array(list(rows.values())).reshape(-1, 2).T
    places = np.arange(len(rows))
    axes.barh(places, values, xerr=errors, color=colors, height=BAR, ecolor=theme.ink)
    for place, value, error in zip(places, values, errors):
        end_label(axes, max(value, 0) + error, place, label(value), theme.muted)
    name_rows(axes, list(rows))


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows 0, 1, ... from the top down, each with its name."""
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def end_label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Write a value beside the end of a line."""
    note(axes, text, (x, y), (5, 0), color, va="center", annotation_clip=False)


def note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset_points: tuple[float, float],
    color: str,
    **placing: Any,
) -> None:
    """Write beside a point; `placing` is what else `Axes.annotate` takes."""
    axes.annotate(
        text, at, xytext=offset_points, textcoords="offset points", color=color, **placing
    )


def legend(
    figure: Figure, palette: Mapping[str, str], mark: Mapping[str, Any], **placing: Any
) -> None:
    """Name -> colour outside the panels, behind a mark that `Line2D` draws.

    `placing` is what `Figure.legend` takes.
    """
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name, **mark) for name, color in palette.items()]
    figure.legend(handles=handles, **placing)
