"""The report of a run: one HTML file that needs nothing but itself, and the plots as PNGs."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from gmm_jepa.evaluate import captions, plots
from gmm_jepa.evaluate.evaluate import Evaluation
from gmm_jepa.evaluate.theme import DARK, LIGHT, Theme, style, to_png
from gmm_jepa.files import write_text, written_aside

Pictures = Mapping[str, tuple[bytes, bytes]]
"""Name -> the picture for light and for dark pages, PNG."""

MANY_ROWS = 12
"""Of a list that could be long (rejects), so many are shown."""


def write_report(
    run_dir: str | Path,
    evaluation: Evaluation | None,
    metrics: Sequence[Mapping[str, Any]] = (),
    *,
    name: str | None = None,
) -> Path:
    """Write ``report.html``, ``plots/*.png`` and, if given, the evaluation itself.

    A section whose data is missing is left out: a run that was never evaluated, audio without
    labels, a run without metrics yet. ``config.json`` and ``rejects.jsonl`` are read from the
    folder where they are there.

    Args:
        run_dir: the run's folder; it is made if it is absent.
        evaluation: what `evaluate` returned, or `Evaluation.load`; None without one.
        metrics: lines of ``metrics.jsonl``, in order.
        name: title; the folder's name if None.

    Returns:
        The path of the report.

    Raises:
        ImportError: matplotlib is not installed; the evaluation is saved all the same.
    """
    run_dir = Path(run_dir)
    if evaluation is not None:
        evaluation.save(run_dir)
    evaluation = evaluation or Evaluation({})
    pictures = draw(evaluation, metrics)
    for key, (light, _) in pictures.items():
        with written_aside(run_dir / "plots" / f"{key}.png") as aside:
            aside.write_bytes(light)
    title = name or run_dir.resolve().name
    page = _page(title, evaluation.numbers, pictures, metrics, run_dir)
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def draw(evaluation: Evaluation, metrics: Sequence[Mapping[str, Any]] = ()) -> Pictures:
    """Every picture that the data allows, in both themes."""
    both = [_draw(theme, evaluation, metrics) for theme in (LIGHT, DARK)]
    return {key: (both[0][key], both[1][key]) for key in both[0]}


def _draw(
    theme: Theme, evaluation: Evaluation, metrics: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    numbers, arrays = evaluation.numbers, evaluation.arrays
    figures: dict[str, Callable[[], Any]] = {
        "losses": lambda: plots.losses(theme, metrics),
        "meters": lambda: plots.meters(theme, metrics),
        "optimisation": lambda: plots.optimisation(theme, metrics),
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
    pictures = {}
    with style(theme):
        for key, make in figures.items():
            figure = make()
            if figure is not None:
                pictures[key] = to_png(figure)
    return pictures


def _page(
    title: str,
    numbers: Mapping[str, Any],
    pictures: Pictures,
    metrics: Sequence[Mapping[str, Any]],
    run_dir: Path,
) -> str:
    sections = [
        ("Result", _cards(numbers, metrics)),
        ("Probes", _probes(numbers)),
        ("Training", _figures(pictures, ("losses", "meters", "optimisation"))),
        ("Mixture and clusters", _mixture(pictures)),
        ("Embedding", _figures(pictures, ("embedding",))),
        ("Utterances", _examples(numbers, pictures)),
        ("Rejects", _rejects(run_dir / "rejects.jsonl")),
        ("Settings", _settings(run_dir / "config.json", numbers)),
    ]
    kept = [(head, body) for head, body in sections if body]
    folder = resources.files("gmm_jepa.evaluate")
    return Template((folder / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(_subtitle(numbers, metrics)),
        style=(folder / "report.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h, _ in kept if h != "Result"),
        body="\n".join(
            f'<section id="{_anchor(head)}">'
            + (f"<h2>{escape(head)}</h2>" if head != "Result" else "")
            + f"{body}</section>"
            for head, body in kept
        ),
        written=escape(datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    )


def _anchor(head: str) -> str:
    return head.lower().replace(" ", "-")


def _subtitle(numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if metrics:
        parts.append(f"{metrics[-1].get('step', 0):,} steps")
    sample = numbers.get("sample")
    if sample:
        speakers = sample["heldout_speakers"]
        parts.append(
            f"evaluated on {sample['heldout_s'] / 60:.1f} min of held-out speech, "
            f"{sample['heldout_utterances']} utterances"
            + (f", {speakers} speaker{'s' * (speakers != 1)}" if speakers else "")
        )
    else:
        parts.append("not evaluated yet")
    return " · ".join(parts)


def _cards(numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The figures a reader looks for first."""
    cards = []
    for task in numbers.get("probes", [])[:2]:
        found = {row["features"]: row["accuracy"] for row in task["rows"]}
        controls = [
            f"{words}\u00a0{100 * found[key]:.1f}"
            for key, words in (("untrained, all layers", "untrained"), ("log-mel", "log-mel"))
            if key in found
        ]
        value = f"{100 * found['trained, all layers']:.1f} %"
        cards.append((f"{task['task']}, linear probe", value, ", ".join(controls)))
    if "clusters" in numbers:
        clusters = numbers["clusters"]
        head = clusters["head"]
        cards += [
            (
                "cluster usage entropy",
                f"{head['entropy']:.3f}",
                f"{head['used']} of {clusters['n_clusters']} clusters used",
            ),
            (
                "head agrees with mixture",
                f"{100 * clusters['agreement']:.1f} %",
                f"KL {clusters['kl']:.2f} nats",
            ),
        ]
        z = numbers["embedding"]
        cards.append(
            (
                "effective rank of z",
                f"{z['effective_rank']:.0f}",
                f"of {z['dimensions']}; mean cosine {z['mean_cosine']:.2f}",
            )
        )
    speeds = [line["audio_s_per_s"] for line in metrics if line.get("audio_s_per_s")]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        cards.append(("training speed", f"{middle:.0f} s/s", "audio seconds per second, median"))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{escape(label)}</span><strong>{escape(value)}</strong>'
            f"<small>{escape(note)}</small></div>"
            for label, value, note in cards
        )
        + "</div>"
        if cards
        else ""
    )


def _picture(pictures: Pictures, key: str, text: str, caption: str = "") -> str:
    """One picture that follows the page's theme, with a caption; nothing if it was not drawn."""
    if key not in pictures:
        return ""
    light, dark = (
        "data:image/png;base64," + base64.b64encode(png).decode() for png in pictures[key]
    )
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure class="{escape(key.rstrip("0123456789_"))}"><picture>'
        f'<source media="(prefers-color-scheme: dark) and (not print)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(text)}" loading="lazy"></picture>{note}</figure>'
    )


def _figures(pictures: Pictures, keys: Sequence[str]) -> str:
    return "".join(_picture(pictures, k, captions.TITLES[k], captions.CAPTIONS[k]) for k in keys)


def _mixture(pictures: Pictures) -> str:
    keys = ("mixture_fit", "cluster_usage", "transitions", "layer_weights")
    body = _figures(pictures, keys)
    return f'<div class="pairs">{body}</div>' if body else ""


def _examples(numbers: Mapping[str, Any], pictures: Pictures) -> str:
    parts = []
    for i, described in enumerate(numbers.get("examples", [])):
        picture = _picture(pictures, f"example_{i + 1}", f"Utterance {i + 1}")
        if not picture:
            continue
        text = described["text"] or f"utterance {i + 1}"
        about = ", ".join(filter(None, (described["speaker"], f"{described['duration_s']:.1f} s")))
        parts.append(f"<h3>{escape(text)} <small>{escape(about)}</small></h3>{picture}")
    return f'<p class="lead">{captions.EXAMPLES}</p>{"".join(parts)}' if parts else ""


def _probes(numbers: Mapping[str, Any]) -> str:
    tables = "".join(_probe_table(task) for task in numbers.get("probes", []))
    if not tables:
        return ""
    return f'<p class="lead">{captions.PROBES}</p><div class="pairs tables">{tables}</div>'


def _probe_table(task: Mapping[str, Any]) -> str:
    rows = []
    for row in task["rows"]:
        kind = "trained" if row["features"].startswith("trained") else "control"
        percent = 100 * row["accuracy"]
        rows.append(
            f'<tr class="{kind}"><th scope="row">{escape(row["features"])}</th>'
            f'<td class="bar"><i style="width:{percent:.1f}%"></i></td>'
            f"<td><b>{percent:.1f}</b> ± {100 * row['standard_error_utterances']:.1f}</td>"
            f"<td>{100 * row['macro_f1']:.1f}</td><td>{row['dimensions']:,}</td></tr>"
        )
    first = task["rows"][0]
    unit = "frames" if task["level"] == "frame" else "utterances"
    note = (
        f"{first['n_train']:,} {unit} to learn from, {first['n_test']:,} to test on "
        f"({task['n_test_utterances']:,} utterances); {task['n_classes']} classes, "
        f"the commonest {100 * task['majority']:.1f} %. Test: {task['split']}."
    )
    return (
        f'<table><thead><tr><th scope="col">{escape(task["task"])}</th><th></th>'
        '<th scope="col">accuracy, %</th><th scope="col">macro F1</th>'
        f'<th scope="col">dim.</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><td colspan="5">{escape(note)}</td></tr></tfoot></table>'
    )


def _rejects(path: Path) -> str:
    """What could not be used, by reason; the first ones by name."""
    if not path.exists():
        return ""
    rejects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            reject = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(reject, dict):
            rejects.append(reject)
    if not rejects:
        return ""
    kinds = Counter(str(r.get("reason", "unknown")).split(":", 1)[0] for r in rejects)
    summary = ", ".join(f"{count} × {escape(kind)}" for kind, count in kinds.most_common())
    rows = "".join(_reject_row(reject) for reject in rejects[:MANY_ROWS])
    more = len(rejects) - MANY_ROWS
    tail = f"<p>and {more:,} more in <code>rejects.jsonl</code></p>" if more > 0 else ""
    return (
        f'<p class="lead">{len(rejects):,} inputs could not be used: {summary}.</p>'
        f"<details><summary>Which ones</summary><table class='plain'>{rows}</table>{tail}</details>"
    )


def _reject_row(reject: Mapping[str, Any]) -> str:
    line = reject.get("line")
    place = str(reject.get("file", "")) + ("" if line is None else f", line {line}")
    reason = escape(str(reject.get("reason", "")))
    return f"<tr><th scope='row'>{escape(place)}</th><td>{reason}</td></tr>"


def _settings(path: Path, numbers: Mapping[str, Any]) -> str:
    """The config as one small table for each group, and the versions."""
    groups: list[tuple[str, Mapping[str, Any]]] = []
    if path.exists():
        try:
            _flatten("", json.loads(path.read_text(encoding="utf-8")), groups)
        except json.JSONDecodeError:
            groups.append(("config.json", {"": "not JSON"}))
    if numbers.get("versions"):
        groups.append(("versions", numbers["versions"]))
    tables = "".join(
        f"<table class='plain'><caption><b>{escape(name)}</b></caption>"
        + "".join(
            f"<tr><th scope='row'>{escape(key)}</th><td>{escape(_plain(value))}</td></tr>"
            for key, value in values.items()
        )
        + "</table>"
        for name, values in groups
    )
    if not tables:
        return ""
    return f"<details><summary>All settings</summary><div class='groups'>{tables}</div></details>"


def _flatten(name: str, values: Any, groups: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Nested objects as (dotted name, flat values) groups, in their order."""
    if not isinstance(values, dict):
        groups.append((name, {"": values}))
        return
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if flat:
        groups.append((name or "run", flat))
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(f"{name}.{key}".lstrip("."), value, groups)


def _plain(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def summary_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The result as a short table for the terminal; the first row is the head.

    Args:
        numbers: `Evaluation.numbers`, or the content of ``evaluation.json``.
    """
    rows = [["held out", "trained", "untrained", "log-mel", "with context"]]
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
    clusters = numbers["clusters"]
    head = clusters["head"]
    rows += [
        [f"effective rank of {z['dimensions']}", *_pair(z, control, "effective_rank", ".1f")],
        ["mean cosine", *_pair(z, control, "mean_cosine", ".3f")],
        ["cluster usage entropy", f"{head['entropy']:.3f}"],
        [f"clusters used of {clusters['n_clusters']}", str(head["used"])],
        ["adjacent frames alike %", f"{100 * head['adjacent_consistency']:.1f}"],
        ["agreement with mixture %", f"{100 * clusters['agreement']:.1f}"],
        ["KL to mixture, nats", f"{clusters['kl']:.3f}"],
        ["mixture log-likelihood, nats/frame", f"{numbers['mixture']['log_likelihood']:.2f}"],
    ]
    return [[*row, *[""] * (5 - len(row))] for row in rows]


def _pair(trained: Mapping[str, Any], control: Mapping[str, Any], key: str, form: str) -> list[str]:
    return [format(values[key], form) if key in values else "" for values in (trained, control)]
