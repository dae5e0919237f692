"""The report of a run: one HTML file that needs nothing but itself, and the plots as PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmm_jepa.evaluate import captions, curves, plots, sections
from gmm_jepa.evaluate.evaluation import Evaluation
from gmm_jepa.report.html import page
from gmm_jepa.report.pictures import Figures, Pictures, draw, save
from gmm_jepa.report.theme import Theme
from gmm_jepa.report.words import show
from gmm_jepa.train.alarm import Event, read_alarms


def write_report(
    run_dir: str | Path,
    evaluation: Evaluation,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``report.html``, ``plots/*.png`` and the evaluation itself.

    A section whose data is missing is left out: audio without labels, a run without metrics yet;
    an earlier report's pictures of it are removed. ``config.json``, ``alarms.jsonl`` and
    ``rejects.jsonl`` are read from the folder where they are there.

    Args:
        run_dir: the run's folder; it is made if it is absent.
        evaluation: what `evaluate` returned.
        metrics: lines of ``metrics.jsonl``, in order.

    Returns:
        The path of the report.

    Raises:
        ImportError: matplotlib is not installed; the evaluation is saved all the same.
    """
    run_dir = Path(run_dir)
    evaluation.save(run_dir)
    alarms = read_alarms(run_dir / "alarms.jsonl")
    pictures = draw(lambda theme: _figures(theme, evaluation, metrics, alarms))
    html = page(
        run_dir.resolve().name,
        sections.subtitle(evaluation.numbers, metrics),
        _parts(evaluation.numbers, pictures, alarms, run_dir),
        "The numbers are in <code>evaluation.json</code> and <code>metrics.jsonl</code>, "
        "the pictures in <code>plots/</code>.",
    )
    of = (*captions.TITLES, "probes", "example_[0-9]")
    return save(run_dir / "report.html", html, pictures, of=of)


def _figures(
    theme: Theme,
    evaluation: Evaluation,
    metrics: Sequence[Mapping[str, Any]],
    alarms: Sequence[Event],
) -> Figures:
    numbers, arrays = evaluation.numbers, evaluation.arrays
    figures = {
        "losses": curves.losses(theme, metrics),
        "meters": curves.meters(theme, metrics, alarms),
        "optimisation": curves.optimisation(theme, metrics),
        "mixture_fit": plots.mixture_fit(theme, numbers),
        "cluster_usage": plots.cluster_usage(theme, arrays),
        "transitions": plots.transitions(theme, arrays),
        "layer_weights": plots.layer_weights(theme, numbers),
        "embedding": plots.embedding(theme, arrays),
        "probes": plots.probes(theme, numbers),
    }
    for i, described in enumerate(numbers.get("examples", [])):
        figures[f"example_{i + 1}"] = plots.example(theme, arrays, i, described)
    return figures


def _parts(
    numbers: Mapping[str, Any],
    pictures: Pictures,
    alarms: Sequence[Event],
    run_dir: Path,
) -> list[tuple[str, str]]:
    training = sections.figures(pictures, "losses", "meters", "optimisation")
    embedding = sections.figures(pictures, "embedding")
    return [
        ("Result", sections.cards(numbers)),
        ("Probes", sections.probes(numbers)),
        ("Training", sections.alarms(alarms) + training),
        ("Mixture and clusters", sections.clusters(numbers, pictures)),
        ("Embedding", embedding + sections.embedding_table(numbers)),
        ("Utterances", sections.examples(numbers, pictures)),
        ("Rejects", sections.rejects(run_dir / "rejects.jsonl")),
        ("Settings", sections.settings(run_dir / "config.json", numbers)),
    ]


def summary_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The result as a short table for the terminal; the first row is the head.

    Args:
        numbers: `Evaluation.numbers`, or the content of ``evaluation.json``.
    """
    rows = [["measure", "trained", "untrained", "log-mel", "with context"]]
    for task in numbers.get("probes", []):
        found = {row["features"]: f"{100 * row['accuracy']:.1f}" for row in task["rows"]}
        context = next((v for k, v in found.items() if k.startswith("log-mel,")), "")
        for part in ("all layers", "output z"):
            rows.append(
                [
                    f"{task['task']} accuracy %, {part}",
                    found.get(f"trained, {part}", ""),
                    found.get(f"untrained, {part}", ""),
                    *((found.get("log-mel", ""), context) if part == "all layers" else ("", "")),
                ]
            )
    z, control = numbers["embedding"], numbers["embedding"].get("untrained", {})
    rows += [
        [f"effective rank of {z['dimensions']}", *_pair(z, control, "effective_rank", ".1f")],
        ["mean cosine", *_pair(z, control, "mean_cosine", ".3f")],
    ]
    if "clusters" in numbers:
        clusters = numbers["clusters"]
        head = clusters["head"]
        rows += [
            ["cluster usage entropy", show(head["entropy"], ".3f")],
            [f"clusters used of {clusters['n_clusters']}", str(head["used"])],
            ["adjacent frames alike %", show(head["adjacent_consistency"], ".1f", scale=100)],
            ["agreement with targets %", show(clusters["agreement"], ".1f", scale=100)],
            ["KL to targets, nats", show(clusters["kl"], ".3f")],
        ]
    if "mixture" in numbers:
        likelihood = numbers["mixture"]["log_likelihood"]
        rows.append(["mixture log-likelihood, nats/frame", show(likelihood, ".2f")])
    width = 5 if numbers.get("probes") else 3  # log-mel stands beside probes only
    return [[*row, *[""] * 5][:width] for row in rows]


def _pair(trained: Mapping[str, Any], control: Mapping[str, Any], key: str, form: str) -> list[str]:
    return [show(values[key], form) if key in values else "" for values in (trained, control)]
