"""The pictures of a probe's report; drawn inside `theme.style`, None where there is nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gmm_jepa.downstream.metrics import confusion as count_confusion
from gmm_jepa.report.charts import BAR, DASHED, end_label, grid, name_rows
from gmm_jepa.report.theme import HALF_IN, WIDE_IN, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MANY_CLASSES = 12
"""Larger confusion tables have no numbers in their cells."""


def colors(theme: Theme, rows: Sequence[Row]) -> list[str]:
    """Trained encoders in strong colours, each untrained one grey, log-mel violet."""
    strong = itertools.cycle(theme.wheel[:4])
    fixed = {"untrained": theme.grey, "log-mel": theme.violet}
    return [fixed.get(row["kind"]) or next(strong) for row in rows]


def curves(theme: Theme, numbers: Mapping[str, Any]) -> Figure | None:
    """Losses and the first score over the steps, at each row's chosen learning rate."""
    score = numbers["scores"][0]
    panels = {
        "train_loss": "Training loss",
        "dev_loss": "Dev loss",
        f"dev_{score}": f"Dev {score.replace('_', ' ')}, %",
    }
    if not any(_points(row, key) for row in numbers["rows"] for key in panels):
        return None
    figure, axes = grid(list(panels.values()))
    for panel, key in zip(axes, panels):
        for row, color in zip(numbers["rows"], colors(theme, numbers["rows"])):
            points = _points(row, key)
            if points:
                steps, values = zip(*points)
                panel.plot(steps, values, "-o", color=color, markersize=3, label=row["features"])
                end_label(panel, steps[-1], values[-1], f"{values[-1]:.3g}", color)
    axes[0].legend(loc="best", labelcolor="linecolor", handlelength=1.2)
    return figure


def layer_weights(theme: Theme, numbers: Mapping[str, Any]) -> Figure | None:
    """Weight of every layer, a panel an encoder."""
    rows = [row for row in numbers["rows"] if len(row["layer_weights"]) > 1]
    if not rows:
        return None
    figure, panels = grid([row["features"] for row in rows])
    assert figure is not None
    for panel, row, color in zip(panels, rows, colors(theme, rows)):
        weights = row["layer_weights"]
        panel.bar(np.arange(len(weights)), weights, color=color, width=0.6)
        panel.axhline(1 / len(weights), color=theme.grey, linewidth=1, linestyle=DASHED)
        panel.set_xlabel("layer (0: front end; dashed: equal)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(False, axis="x")
    return figure


def confusion(theme: Theme, numbers: Mapping[str, Any], row: Row) -> Figure | None:
    """Test answers against truth, as shares of each true class."""
    classes, predictions = numbers["classes"], row["predictions"]
    if not classes or not predictions:
        return None
    answers, truth = ([p[k] for p in predictions] for k in ("hypothesis", "reference"))
    table = count_confusion(answers, truth, classes)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure = new_figure(HALF_IN, 4.3)
    axes = figure.subplots()
    axes.imshow(shares, cmap=theme.colormap, vmin=0, vmax=1)
    if len(classes) <= _MANY_CLASSES:
        _write_counts(axes, theme, table, shares)
    places = np.arange(len(classes))
    axes.set_xticks(places, classes, rotation=45 if len(classes) > 5 else 0)
    axes.set_yticks(places, classes)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(row["features"])
    axes.grid(False)
    return figure


def slot_bars(theme: Theme, row: Row, found: Mapping[str, tuple[int, int, int]]) -> Figure | None:
    """Of each slot type: utterances where it was found, missed, or only invented."""
    if not found:
        return None
    names = sorted(found, key=lambda kind: -sum(found[kind][:2]))[:25]
    figure = new_figure(WIDE_IN, 0.26 * len(names) + 1.0)
    axes = figure.subplots()
    left = np.zeros(len(names))
    parts = (("found", theme.teal), ("missed", theme.grey), ("invented", theme.coral))
    for i, (name, color) in enumerate(parts):
        counts = np.array([found[kind][i] for kind in names], float)
        axes.barh(np.arange(len(names)), counts, left=left, color=color, height=BAR, label=name)
        left += counts
    name_rows(axes, names)
    axes.set_title(f"{row['features']}: test utterances by slot type")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3, handlelength=1)
    return figure


def _write_counts(axes: Axes, theme: Theme, table: Any, shares: Any) -> None:
    for i, j in np.ndindex(*table.shape):
        color = theme.paper if shares[i, j] > 0.6 else theme.ink
        axes.text(j, i, str(table[i, j]), ha="center", va="center", color=color, fontsize=9)


def _points(row: Row, key: str) -> list[tuple[int, float]]:
    """Steps and values of the first fold at the chosen learning rate."""
    lines = row["curves"].get(repr(row["learning_rate"]), [[]])[0]
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]
