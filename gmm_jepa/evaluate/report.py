"""The report of a run: one HTML file that needs nothing but itself, and the plots as PNGs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from gmm_jepa.evaluate import captions, curves, plots, sections
from gmm_jepa.evaluate.evaluation import Evaluation
from gmm_jepa.evaluate.sections import show
from gmm_jepa.evaluate.theme import DARK, LIGHT, Theme, style, to_png
from gmm_jepa.files import write_text, written_aside
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
    save_pictures(run_dir / "plots", pictures, of=(*captions.TITLES, "probes", "example_[0-9]"))
    body = page(
        run_dir.resolve().name,
        sections.subtitle(evaluation.numbers, metrics),
        _parts(evaluation.numbers, pictures, alarms, run_dir),
        "The numbers are in <code>evaluation.json</code> and <code>metrics.jsonl</code>, "
        "the pictures in <code>plots/</code>.",
    )
    write_text(run_dir / "report.html", body)
    return run_dir / "report.html"


Figures = Mapping[str, Callable[[], Any]]
"""Name -> what draws the figure, or returns None."""


def draw(figures: Callable[[Theme], Figures]) -> sections.Pictures:
    """Every picture that the data allows, in both themes."""
    both = []
    for theme in (LIGHT, DARK):
        with style(theme):
            made = {key: make() for key, make in figures(theme).items()}
            both.append({key: to_png(f, theme) for key, f in made.items() if f is not None})
    return {key: (both[0][key], both[1][key]) for key in both[0]}


def save_pictures(folder: Path, pictures: sections.Pictures, *, of: Sequence[str] = ()) -> None:
    """Write the light ones as PNGs.

    Args:
        folder: made if absent.
        pictures: by name.
        of: patterns of names; an earlier picture of such a name that was not drawn is removed.
    """
    for path in [path for name in of for path in folder.glob(f"{name}.png")]:
        if path.stem not in pictures:
            path.unlink()
    for key, (light, _) in pictures.items():
        with written_aside(folder / f"{key}.png") as aside:
            aside.write_bytes(light)


def _figures(
    theme: Theme,
    evaluation: Evaluation,
    metrics: Sequence[Mapping[str, Any]],
    alarms: Sequence[Event],
) -> Figures:
    numbers, arrays = evaluation.numbers, evaluation.arrays
    figures: dict[str, Callable[[], Any]] = {
        "losses": lambda: curves.losses(theme, metrics),
        "meters": lambda: curves.meters(theme, metrics, alarms),
        "optimisation": lambda: curves.optimisation(theme, metrics),
        "mixture_fit": lambda: plots.mixture_fit(theme, numbers),
        "cluster_usage": lambda: plots.cluster_usage(theme, arrays),
        "transitions": lambda: plots.transitions(theme, arrays),
        "layer_weights": lambda: plots.layer_weights(theme, numbers),
        "embedding": lambda: plots.embedding(theme, arrays),
        "probes": lambda: plots.probes(theme, numbers),
    }
    for i, described in enumerate(numbers.get("examples", [])):
        figures[f"example_{i + 1}"] = lambda i=i, described=described: plots.example(
            theme, arrays, i, described
        )
    return figures


def _parts(
    numbers: Mapping[str, Any],
    pictures: sections.Pictures,
    alarms: Sequence[Event],
    run_dir: Path,
) -> list[tuple[str, str]]:
    return [
        ("Result", sections.cards(numbers)),
        ("Probes", sections.probes(numbers)),
        (
            "Training",
            sections.alarms(alarms)
            + sections.figures(pictures, ("losses", "meters", "optimisation")),
        ),
        ("Mixture and clusters", sections.clusters(numbers, pictures)),
        (
            "Embedding",
            sections.figures(pictures, ("embedding",)) + sections.embedding_table(numbers),
        ),
        ("Utterances", sections.examples(numbers, pictures)),
        ("Rejects", sections.rejects(run_dir / "rejects.jsonl")),
        ("Settings", sections.settings(run_dir / "config.json", numbers)),
    ]


def page(title: str, subtitle: str, parts: Sequence[tuple[str, str]], sources: str) -> str:
    """One HTML page that needs nothing but itself.

    Args:
        title, subtitle: plain text.
        parts: headings and HTML; the first, "Result", stands without its heading, and what is
            empty is left out.
        sources: HTML, where the numbers come from.
    """
    kept = [(head, body) for head, body in parts if body]
    folder = resources.files("gmm_jepa.evaluate")
    return Template((folder / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=(folder / "report.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _ in kept if h != "Result"),
        body="\n".join(
            f'<section id="{_anchor(head)}">'
            + (f"<h2>{escape(head)}</h2>" if head != "Result" else "")
            + f"{body}</section>"
            for head, body in kept
        ),
        sources=sources,
        written=escape(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    )


def _anchor(head: str) -> str:
    return head.lower().replace(" ", "-")


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
