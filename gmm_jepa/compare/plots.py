"""The pictures of a comparison: one colour a system, in every picture the same.

Figures are drawn inside `theme.style`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gmm_jepa.report import charts
from gmm_jepa.report.theme import WIDE_IN, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Histories = Mapping[str, Sequence[charts.Metrics]]
"""What is compared -> the metrics of its runs, one a seed."""

SPEED = {
    "loss": "Loss",
    "gradient_norm": "Gradient norm",
    "audio_s_per_s": "Audio seconds a second",
}
CONTROLS = ("untrained, all layers", "log-mel", "log-mel, 3 frames each side")
HELD_OUT = {
    "head/entropy": "Cluster usage entropy",
    "head/used": "Clusters used",
    "head/adjacent_consistency": "Adjacent frames alike",
    "embedding/effective_rank": "Effective rank of z",
    "embedding/std": "Standard deviation of z",
    "embedding/mean_cosine": "Mean pairwise cosine of z",
}


def colors(theme: Theme, names: Sequence[str]) -> dict[str, str]:
    """A colour for each thing that is compared."""
    return dict(zip(names, itertools.cycle(theme.wheel)))


def losses(theme: Theme, histories: Histories) -> Figure | None:
    """Parts of the loss and speed."""
    parts = {key: title for key, title in charts.LOSSES.items() if key != "lambda"}
    return _overlay(theme, histories, SPEED | parts)


def meters(theme: Theme, histories: Histories) -> Figure | None:
    """Collapse meters, at the output and at the front end."""
    return _overlay(theme, histories, charts.METERS)


def _overlay(theme: Theme, histories: Histories, titles: Mapping[str, str]) -> Figure | None:
    """A panel for every key that some run has: a line a system, each seed pale behind it."""
    found = {key: {name: _curves(runs, key) for name, runs in histories.items()} for key in titles}
    shown = [key for key in titles if any(found[key].values())]
    figure, panels = charts.grid([titles[key] for key in shown])
    palette = colors(theme, list(histories))
    for axes, key in zip(panels, shown):
        for name, runs in found[key].items():
            _bundle(axes, runs, palette[name])
    if figure is not None:
        charts.legend(
            figure,
            palette,
            {},
            loc="outside upper left",
            ncols=min(len(palette), 5),
            labelcolor="linecolor",
            handlelength=1.4,
            columnspacing=1.8,
        )
    return figure


def _curves(runs: Sequence[charts.Metrics], key: str) -> list[charts.Points]:
    return [points for run in runs if (points := charts.curve(run, key))]


def _bundle(axes: Axes, runs: Sequence[charts.Points], color: str) -> None:
    """The runs of one system and, over the steps they share, their mean."""
    if not runs:
        return
    if len(runs) > 1:
        for steps, values in runs:
            axes.plot(steps, charts.smooth(values), color=color, alpha=0.3, linewidth=0.9)
    common = runs[0][0]
    for steps, _ in runs[1:]:
        common = np.intersect1d(common, steps)
    if not len(common):
        return
    mean = charts.smooth(np.mean([v[np.isin(s, common)] for s, v in runs], axis=0))
    axes.plot(common, mean, color=color)
    axes.plot(common[-1], mean[-1], "o", color=color, markersize=3.5)


def held_out(theme: Theme, systems: Mapping[str, Any]) -> Figure | None:
    """Clusters and embedding on held-out audio, mean and spread, a panel for every measure."""
    shown = [key for key in HELD_OUT if any(key in s["summary"] for s in systems.values())]
    figure, panels = charts.grid([HELD_OUT[key] for key in shown])
    palette = colors(theme, list(systems))
    for axes, key in zip(panels, shown):
        rows = {n: s["summary"][key] for n, s in systems.items() if key in s["summary"]}
        _bars(axes, theme, rows, palette, "{:.3g}")
        axes.margins(x=0.25)
        axes.set_xlabel("")
    return figure


def probes(theme: Theme, systems: Mapping[str, Any]) -> Figure | None:
    """Probe accuracy of every system and of the controls, a panel for every task."""
    tasks = task_names(systems)
    if not tasks:
        return None
    rows = [probe_rows(systems, task) for task in tasks]
    figure = new_figure(WIDE_IN, sum(0.36 * len(part) + 0.9 for part in rows))
    heights = [len(part) + 2.5 for part in rows]
    panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights).reshape(-1)
    palette = colors(theme, list(systems))
    for axes, task, part in zip(panels, tasks, rows):
        _bars(axes, theme, part, palette, "{:.1f}", scale=100)
        axes.set_xlim(0, 100)
        axes.set_title(f"{task}: accuracy of a linear probe, %")
    return figure


def _bars(
    axes: Axes,
    theme: Theme,
    rows: Mapping[str, Mapping[str, Any]],
    palette: Mapping[str, str],
    form: str,
    *,
    scale: float = 1,
) -> None:
    """A bar a row, with its spread and its value; what is no system is grey."""
    scaled = {n: (scale * row["mean"], scale * (row["spread"] or 0)) for n, row in rows.items()}
    charts.bars(axes, theme, scaled, [palette.get(name, theme.grey) for name in rows], form.format)


def task_names(systems: Mapping[str, Any]) -> list[str]:
    """Tasks that any run was probed for, in order."""
    names = [task["task"] for s in systems.values() for run in s["runs"] for task in run["probes"]]
    return list(dict.fromkeys(names))


def probe_rows(systems: Mapping[str, Any], task: str) -> dict[str, Mapping[str, Any]]:
    """Name of a row -> mean and spread: the systems on all layers, then the first one's controls
    (the same audio for all, and for equal encoders and seeds the same untrained one)."""
    rows = {
        name: found
        for name, system in systems.items()
        if (found := system["summary"].get(f"probe/{task}/trained, all layers"))
    }
    first = next(iter(systems.values()))["summary"]
    for control in CONTROLS:
        if f"probe/{task}/{control}" in first:
            rows[control.removesuffix(", all layers")] = first[f"probe/{task}/{control}"]
    return rows
