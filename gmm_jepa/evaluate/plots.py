"""The pictures of a report; each function draws one figure, or None where its data is missing.

Figures are drawn inside `theme.style`. Wide ones fill the page, half ones stand in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.evaluate.colors import cluster_colors
from gmm_jepa.evaluate.phone_classes import CLASSES, broad_class
from gmm_jepa.report.charts import DASHED, bars, end_label, legend, note
from gmm_jepa.report.theme import HALF_IN, WIDE_IN, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arrays = Mapping[str, NDArray[Any]]
_AT_THE_RIGHT: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right"}
"""Where a note on a level stands."""


def mixture_fit(theme: Theme, numbers: Mapping[str, Any]) -> Figure | None:
    """EM's mean log-likelihood per frame at each of its steps, and the held-out value."""
    values = np.asarray(numbers.get("mixture", {}).get("train_curve", []), dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    figure = new_figure(HALF_IN, 3.3)
    axes = figure.subplots()
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, "-o", color=theme.blue, markersize=3)
    end_label(axes, steps[-1], values[-1], f"{values[-1]:.2f}", theme.blue)
    heldout = numbers["mixture"].get("log_likelihood")
    if heldout is not None and math.isfinite(heldout):
        axes.axhline(heldout, color=theme.gold, linewidth=1.2, linestyle=DASHED)
        note(axes, f"held-out {heldout:.2f}", (1, heldout), (0, 4), theme.gold, **_AT_THE_RIGHT)
    axes.set_title("Mean log-likelihood of a frame, nats")
    one_pass = numbers["mixture"].get("one_pass", False)
    axes.set_xlabel("mini-batch" if one_pass else "iteration of EM")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.15)
    return figure


def cluster_usage(theme: Theme, arrays: Arrays) -> Figure | None:
    """Share of frames per cluster, commonest first, on a log scale."""
    if "usage_head" not in arrays:
        return None
    figure = new_figure(HALF_IN, 3.3)
    axes = figure.subplots()
    for name, key, color in (
        ("targets", "usage_mixture", theme.blue),
        ("cluster head", "usage_head", theme.coral),
    ):
        counts = np.sort(arrays[key])[::-1]
        counts = counts[counts > 0]
        ranks = np.arange(1, len(counts) + 1)
        axes.plot(ranks, counts / counts.sum(), color=color, label=name)
        axes.plot(ranks[-1], counts[-1] / counts.sum(), "o", color=color, markersize=3.5)
    n = len(arrays["usage_head"])
    axes.axhline(1 / n, color=theme.grey, linewidth=1, linestyle=DASHED)
    note(axes, "even use", (0.995, 1 / n), (0, 3), theme.muted, **_AT_THE_RIGHT)
    axes.set_yscale("log")
    axes.set_xlim(0, n + 1)
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(lambda value, _: f"{100 * value:g} %")
    axes.yaxis.get_minor_locator().set_params(subs=(2, 5))
    axes.set_title("Share of held-out frames in each cluster")
    axes.set_xlabel(f"clusters, commonest first (of {n})")
    axes.legend(loc="upper right", labelcolor="linecolor", handlelength=1.2)
    return figure


def transitions(theme: Theme, arrays: Arrays) -> Figure | None:
    """Probability of the next frame's cluster given this frame's, among the commonest."""
    table = arrays.get("transitions")
    if table is None or len(table) < 2:
        return None
    from matplotlib.colors import PowerNorm

    figure = new_figure(HALF_IN, 4.5)
    axes = figure.subplots()
    image = axes.imshow(
        table, cmap=theme.colormap, norm=PowerNorm(0.45, vmin=0, vmax=1), aspect="equal"
    )
    axes.set_title(f"Next cluster given this one, top {len(table)}")
    axes.set_xlabel("cluster of the next frame")
    axes.set_ylabel("cluster of this frame")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, aspect=26, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.outline.set_visible(False)
    return figure


def layer_weights(theme: Theme, numbers: Mapping[str, Any]) -> Figure | None:
    """How much each layer contributes to z."""
    weights = numbers.get("layer_weights") or []
    if len(weights) < 2:
        return None
    figure = new_figure(HALF_IN, 4.5)
    axes = figure.subplots()
    places = np.arange(len(weights))
    axes.bar(places, weights, color=theme.teal, width=0.45)
    axes.set_xticks(places, ["front end", *(f"block {i}" for i in range(1, len(weights)))])
    if len(weights) > 6:
        axes.set_xticks(places, ["front", *map(str, places[1:])])
        axes.set_xlabel("block")
    axes.axhline(1 / len(weights), color=theme.grey, linewidth=1, linestyle=DASHED)
    for place, weight in zip(places, weights):
        note(axes, f"{weight:.2f}", (place, weight), (0, 4), theme.muted, ha="center")
    axes.grid(False, axis="x")
    axes.set_xlim(-0.7, len(weights) - 0.3)
    axes.set_ylim(0, 1.15 * max(*weights, 1 / len(weights)))
    axes.set_title("Weight of each layer in z (dashed: equal)")
    return figure


def embedding(theme: Theme, arrays: Arrays) -> Figure | None:
    """Held-out frames on the two widest axes of z, before and after training."""
    panels = [
        (name, title)
        for name, title in (("untrained", "Before training"), ("trained", "After training"))
        if len(arrays.get(f"scatter_{name}", ())) > 2
    ]
    if not panels:
        return None
    figure = new_figure(WIDE_IN, 5.0)
    grid = figure.subplots(1, 2, squeeze=False).reshape(-1)
    names: set[str] = set()
    for axes, (name, title) in zip(grid, panels):
        points = arrays[f"scatter_{name}"]
        phones = arrays[f"scatter_{name}_phones"].tolist()
        if any(phones):
            classes = [broad_class(phone) if phone else "other" for phone in phones]
            colors = [theme.classes[c] for c in classes]
            names |= set(classes)
        elif "cluster_map" in arrays:
            palette = cluster_colors(arrays["cluster_map"], theme)
            colors = list(palette[arrays[f"scatter_{name}_clusters"]])
        else:
            colors = [theme.blue] * len(points)
        order = np.random.default_rng(0).permutation(len(points))  # no class lies on top
        axes.scatter(*points[order].T, c=[colors[i] for i in order], s=7, alpha=0.75, linewidths=0)
        low, high = np.percentile(points, [0.3, 99.7], axis=0)
        room = 0.06 * (high - low) + 1e-9
        axes.set_xlim(low[0] - room[0], high[0] + room[0])
        axes.set_ylim(low[1] - room[1], high[1] + room[1])
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    palette = {c: theme.classes[c] for c in CLASSES if c in names}
    if palette:
        legend(
            figure,
            palette,
            {"marker": "o", "linestyle": "", "markersize": 6},
            loc="outside lower center",
            ncols=len(palette),
            handletextpad=0.2,
            columnspacing=1.6,
        )
    return figure


def example(
    theme: Theme, arrays: Arrays, number: int, described: Mapping[str, Any]
) -> Figure | None:
    """Phones, log-mel, clusters of mixture and head, and their entropies, on one time axis."""
    prefix = f"example{number}_"
    if f"{prefix}log_mel" not in arrays:
        return None
    hop_s, n_frames = float(described["hop_s"]), len(arrays[f"{prefix}log_mel"])
    end_s = min(float(described["duration_s"]), (n_frames + 1) * hop_s)
    labelled = f"{prefix}phone_symbols" in arrays
    heights = [*([0.34] if labelled else []), 2.0, 0.3, 0.3, 0.95]
    figure = new_figure(WIDE_IN, 0.95 * sum(heights) + 0.55)
    figure.get_layout_engine().set(h_pad=0.015, hspace=0.0)
    grid = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    if labelled:
        _phone_strip(grid.pop(0), theme, arrays, prefix, end_s)
    spectrogram, below, head, entropy = grid
    _spectrogram(spectrogram, theme, arrays, prefix, described)
    palette = cluster_colors(arrays["cluster_map"], theme)
    for axes, name, color in ((below, "mixture", theme.blue), (head, "head", theme.coral)):
        first_s = float(described[f"{name}_centre_s"])
        extent = (first_s - hop_s / 2, first_s + (n_frames - 0.5) * hop_s, 0, 1)
        axes.imshow(palette[arrays[f"{prefix}{name}"]][None], extent=extent)
        _quiet_strip(axes, name)
        times = first_s + np.arange(n_frames) * hop_s
        entropy.plot(times, arrays[f"{prefix}{name}_entropy"], color=color, label=name, lw=1.4)
    entropy.set_ylabel("entropy,\nnats", rotation=0, ha="right", va="center")
    entropy.set_ylim(0, 1.5 * max(0.2, entropy.get_ylim()[1]))
    entropy.legend(loc="upper right", ncols=2, labelcolor="linecolor", handlelength=1)
    entropy.set_xlim(0, end_s)
    entropy.set_xlabel("seconds")
    return figure


def _spectrogram(
    axes: Axes, theme: Theme, arrays: Arrays, prefix: str, described: Mapping[str, Any]
) -> None:
    log_mel = arrays[f"{prefix}log_mel"].astype(np.float32)
    hop_s, first_s = float(described["hop_s"]), float(described["mixture_centre_s"])
    low, high = np.percentile(log_mel, [4, 99.8])
    axes.imshow(
        log_mel.T,
        origin="lower",
        extent=(first_s - hop_s / 2, first_s + (len(log_mel) - 0.5) * hop_s, 0, log_mel.shape[1]),
        cmap=theme.colormap,
        vmin=low,
        vmax=high,
        interpolation="bilinear",
    )
    for boundary in arrays.get(f"{prefix}phone_starts", ())[1:]:
        axes.axvline(boundary, color=theme.ink, linewidth=0.5, alpha=0.18)
    _quiet_strip(axes, "log-mel")


def _quiet_strip(axes: Axes, name: str) -> None:
    """A row without an axis of its own, named at its left."""
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.set_yticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def _phone_strip(axes: Axes, theme: Theme, arrays: Arrays, prefix: str, end_s: float) -> None:
    starts, ends = arrays[f"{prefix}phone_starts"], arrays[f"{prefix}phone_ends"]
    for start, end, symbol in zip(starts, ends, arrays[f"{prefix}phone_symbols"].tolist()):
        end = min(end, end_s)
        if start >= end:
            continue
        axes.axvspan(start, end, color=theme.classes[broad_class(symbol)], alpha=0.22, linewidth=0)
        axes.axvline(start, color=theme.paper, linewidth=1.2)
        if end - start >= 0.008 * end_s:
            axes.text((start + end) / 2, 0.46, symbol, ha="center", va="center", clip_on=True)
    axes.set_ylim(0, 1)
    _quiet_strip(axes, "phones")


def probes(theme: Theme, numbers: Mapping[str, Any]) -> Figure | None:
    """Accuracy of every feature set for every task, with standard errors."""
    tasks = [task for task in numbers.get("probes", []) if task["rows"]]
    if not tasks:
        return None
    n_rows = max(len(task["rows"]) for task in tasks)
    figure = new_figure(WIDE_IN, (0.36 * n_rows + 0.9) * len(tasks))
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False).reshape(-1), tasks):
        rows = {
            row["features"]: (row["accuracy"], row["standard_error_utterances"])
            for row in task["rows"]
        }
        colors = [_row_color(theme, name) for name in rows]
        bars(axes, theme, rows, colors, lambda value: f"{100 * value:.1f} %")
        axes.axvline(task["majority"], color=theme.grey, linewidth=1.2, linestyle=DASHED)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_title(f"{task['task']}: accuracy of a linear probe (dashed: commonest class)")
    return figure


def _row_color(theme: Theme, features: str) -> str:
    """Trained features stand out, controls stay quiet."""
    if features.startswith("trained"):
        return theme.coral
    return theme.grey if features.startswith("untrained") else theme.blue
