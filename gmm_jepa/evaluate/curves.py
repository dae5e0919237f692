"""What a training went through, as curves over its steps; None where the metrics lack them.

Figures are drawn inside `theme.style`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.evaluate.theme import WIDE_IN, Theme, end_label, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gmm_jepa.train.alarm import Event

Metrics = Sequence[Mapping[str, Any]]
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
OPTIMISATION = {
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "audio_s_per_s": "Audio seconds per second",
}
_COLUMNS = 3
_ROW_IN = 2.5
_SET = {"lambda", "learning_rate"}
"""Set, not measured: drawn as they are, without a running mean."""
_MANY_POINTS = 40
"""From so many on a curve has a running mean."""


def curve(metrics: Metrics, key: str) -> Points:
    """Steps and values of one key; lines without it, or with null or NaN there, are left out.

    A meter of the output is found with and without the prefix ``online_``.
    """
    points = []
    for line in metrics:
        value = line.get(key, line.get(f"online_{key}"))
        if isinstance(value, (int, float)) and math.isfinite(value) and "step" in line:
            points.append((line["step"], value))
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) running mean of a twenty-fifth of the points where there are many, else the values."""
    if len(values) < _MANY_POINTS:
        return values
    width = max(3, len(values) // 25) | 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def losses(theme: Theme, metrics: Metrics) -> Figure | None:
    """The parts of the loss over the steps."""
    colors = dict(zip(LOSSES, (theme.blue, theme.coral, theme.coral, theme.teal)))
    return _one_run(theme, metrics, LOSSES, colors)


def meters(theme: Theme, metrics: Metrics, alarms: Sequence[Event] = ()) -> Figure | None:
    """Collapse meters over the steps, with the steps at which the alarm went off."""
    colors = dict.fromkeys(METERS, theme.blue)
    colors |= {"usage_entropy": theme.coral, "agreement": theme.coral, "teacher_cosine": theme.teal}
    return _one_run(theme, metrics, METERS, colors, alarms)


def optimisation(theme: Theme, metrics: Metrics) -> Figure | None:
    """Learning rate, gradient norm and speed over the steps."""
    colors = dict(zip(OPTIMISATION, (theme.blue, theme.teal, theme.violet)))
    return _one_run(theme, metrics, OPTIMISATION, colors)


def _one_run(
    theme: Theme,
    metrics: Metrics,
    titles: Mapping[str, str],
    colors: Mapping[str, str],
    alarms: Sequence[Event] = (),
) -> Figure | None:
    """One panel for every key that has at least two values."""
    found = {key: points for key in titles if len((points := curve(metrics, key))[0]) >= 2}
    figure, panels = grid([titles[key] for key in found])
    for axes, (key, (steps, values)) in zip(panels, found.items()):
        _line(axes, steps, values, colors[key], smoothed=key not in _SET)
        for event in alarms:
            if event.meter.removeprefix("online_") == key:
                _mark(axes, event.step, theme)
    return figure


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


def _line(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], color: str, *, smoothed: bool
) -> None:
    """A curve: raw and pale, over it a running mean if there are many points; its last value."""
    drawn = smooth(y) if smoothed else y
    if drawn is not y:
        axes.plot(x, y, color=color, alpha=0.28, linewidth=0.9)
    axes.plot(x, drawn, color=color)
    axes.plot(x[-1], drawn[-1], "o", color=color, markersize=3.5)
    end_label(axes, x[-1], drawn[-1], f"{drawn[-1]:.3g}", color)


def _mark(axes: Axes, step: int, theme: Theme) -> None:
    """A dashed line where the alarm went off."""
    axes.axvline(step, color=theme.coral, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"alarm {step:,}",
        (step, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        color=theme.coral,
    )
