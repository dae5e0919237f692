"""What a training went through, as curves over its steps; None where the metrics lack them.

Figures are drawn inside `theme.style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.report import charts
from gmm_jepa.report.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gmm_jepa.train.alarm import Event

OPTIMISATION = {
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "audio_s_per_s": "Audio seconds per second",
}
_SET = {"lambda", "learning_rate"}
"""Set, not measured: drawn as they are, without a running mean."""


def losses(theme: Theme, metrics: charts.Metrics) -> Figure | None:
    """The parts of the loss over the steps."""
    colors = dict(zip(charts.LOSSES, (theme.blue, theme.coral, theme.coral, theme.teal)))
    return _one_run(theme, metrics, charts.LOSSES, colors)


def meters(theme: Theme, metrics: charts.Metrics, alarms: Sequence[Event] = ()) -> Figure | None:
    """Collapse meters over the steps, with the steps at which the alarm went off."""
    colors = dict.fromkeys(charts.METERS, theme.blue)
    colors |= {"usage_entropy": theme.coral, "agreement": theme.coral, "teacher_cosine": theme.teal}
    return _one_run(theme, metrics, charts.METERS, colors, alarms)


def optimisation(theme: Theme, metrics: charts.Metrics) -> Figure | None:
    """Learning rate, gradient norm and speed over the steps."""
    colors = dict(zip(OPTIMISATION, (theme.blue, theme.teal, theme.violet)))
    return _one_run(theme, metrics, OPTIMISATION, colors)


def _one_run(
    theme: Theme,
    metrics: charts.Metrics,
    titles: Mapping[str, str],
    colors: Mapping[str, str],
    alarms: Sequence[Event] = (),
) -> Figure | None:
    """One panel for every key that has at least two values."""
    found = {key: points for key in titles if (points := charts.curve(metrics, key))}
    figure, panels = charts.grid([titles[key] for key in found])
    for axes, (key, (steps, values)) in zip(panels, found.items()):
        _line(axes, steps, values, colors[key], smoothed=key not in _SET)
        for event in alarms:
            if event.meter.removeprefix("online_") == key:
                _mark(axes, event.step, theme)
    return figure


def _line(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], color: str, *, smoothed: bool
) -> None:
    """A curve: raw and pale, over it a running mean if there are many points; its last value."""
    drawn = charts.smooth(y) if smoothed else y
    if drawn is not y:
        axes.plot(x, y, color=color, alpha=0.28, linewidth=0.9)
    axes.plot(x, drawn, color=color)
    axes.plot(x[-1], drawn[-1], "o", color=color, markersize=3.5)
    charts.end_label(axes, x[-1], drawn[-1], f"{drawn[-1]:.3g}", color)


def _mark(axes: Axes, step: int, theme: Theme) -> None:
    """A dashed line where the alarm went off."""
    axes.axvline(step, color=theme.coral, linewidth=1.2, linestyle=charts.DASHED)
    place = {"xycoords": ("data", "axes fraction"), "va": "top"}
    charts.note(axes, f"alarm {step:,}", (step, 0.98), (4, 0), theme.coral, **place)
