"""The sections of a report as HTML; each is empty where its data is missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from gmm_jepa.evaluate import captions
from gmm_jepa.report import html
from gmm_jepa.report.html import table
from gmm_jepa.report.pictures import Pictures
from gmm_jepa.report.words import count, dotted, plain, show
from gmm_jepa.train.alarm import Event

MANY_ROWS = 12
"""Of a list that could be long (rejects), so many are shown."""


def subtitle(numbers: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """One line: how long was trained, and on what was evaluated."""
    parts = []
    if metrics:
        speeds = [line["audio_s_per_s"] for line in metrics if line.get("audio_s_per_s")]
        speed = f" at {median(speeds):,.0f} audio seconds a second" if speeds else ""
        parts.append(f"{metrics[-1].get('step', 0):,} steps{speed}")
    sample = numbers["sample"]
    speakers = sample["heldout_speakers"]
    parts.append(
        f"evaluated on {sample['heldout_s'] / 60:.1f} min of held-out speech, "
        f"{sample['heldout_utterances']} utterances"
        + (f", {count(speakers, 'speaker')}" if speakers else "")
    )
    return " · ".join(parts)


def cards(numbers: Mapping[str, Any]) -> str:
    """The figures a reader looks for first."""
    shown = []
    for task in numbers.get("probes", [])[:2]:
        found = {row["features"]: row["accuracy"] for row in task["rows"]}
        controls = [
            f"{words}\u00a0{100 * found[key]:.1f}"
            for key, words in (("untrained, all layers", "untrained"), ("log-mel", "log\u2011mel"))
            if key in found
        ]
        value = f"{100 * found['trained, all layers']:.1f} %"
        shown.append((f"{task['task']}, linear probe", value, ", ".join(controls)))
    if "clusters" in numbers:
        clusters = numbers["clusters"]
        head = clusters["head"]
        used = f"{head['used']} of {clusters['n_clusters']} clusters used"
        agreement = show(clusters["agreement"], ".1f", scale=100) + " %"
        kl = f"KL {show(clusters['kl'], '.2f')} nats"
        shown.append(("cluster usage entropy", show(head["entropy"], ".3f"), used))
        shown.append(("head agrees with targets", agreement, kl))
    if "embedding" in numbers:
        z = numbers["embedding"]
        note = f"of {z['dimensions']}; mean cosine {show(z['mean_cosine'], '.2f')}"
        shown.append(("effective rank of z", show(z["effective_rank"], ".0f"), note))
    return html.cards(shown)


def figures(pictures: Pictures, *keys: str) -> str:
    """Pictures with their captions, one under the other."""
    return "".join(
        html.picture(pictures, k, captions.TITLES[k], captions.CAPTIONS[k]) for k in keys
    )


def clusters(numbers: Mapping[str, Any], pictures: Pictures) -> str:
    """Pictures of mixture and cluster head in pairs, and their table."""
    drawn = figures(pictures, "mixture_fit", "cluster_usage", "transitions", "layer_weights")
    return html.pairs(drawn) + _cluster_table(numbers)


def _cluster_table(numbers: Mapping[str, Any]) -> str:
    if "clusters" not in numbers:
        return ""
    found, mixture = numbers["clusters"], numbers.get("mixture", {})
    head, other = found["head"], found["mixture"]
    both = [
        ("usage entropy (1: even use)", "entropy", ".3f", 1),
        (f"clusters used, of {found['n_clusters']:,}", "used", ",", 1),
        ("effective clusters (exp of the entropy)", "effective", ",.1f", 1),
        ("share of the commonest cluster, %", "top_share", ".1f", 100),
        ("adjacent frames in one cluster, %", "adjacent_consistency", ".1f", 100),
    ]
    rows = [
        [name, *(show(part[key], form, scale=scale) for part in (head, other))]
        for name, key, form, scale in both
    ]
    rows += [
        ["entropy of a frame's posterior, nats"]
        + [show(found[key], ".3f") for key in ("head_entropy", "target_entropy")],
        ["log-likelihood of a frame, nats", "", show(mixture.get("log_likelihood"), ".2f")],
        ["agreement of the two, %", show(found["agreement"], ".1f", scale=100), ""],
        ["KL from targets to head, nats", show(found["kl"], ".3f"), ""],
    ]
    note = f"{found['n_frames']:,} held-out frames, none masked."
    return table(["clusters", "cluster head", "targets"], rows, note)


def alarms(events: Sequence[Event]) -> str:
    """What the collapse alarm said, if it said something."""
    rows = [
        [event.meter, f"{event.step:,}", f"{event.value:.3g}", event.reason] for event in events
    ]
    return table(["collapse alarm", "step", "value", ""], rows, captions.ALARMS) if rows else ""


def embedding_table(numbers: Mapping[str, Any]) -> str:
    """Meters of z beside those of the untrained encoder."""
    if "embedding" not in numbers:
        return ""
    trained = numbers["embedding"]
    untrained = trained.get("untrained", {})
    names = {
        "effective_rank": f"effective rank, of {trained['dimensions']:,}",
        "std": "standard deviation, mean over dimensions",
        "mean_cosine": "mean pairwise cosine",
    }
    rows = [
        [name] + [show(part[key], ".4g") if key in part else "" for part in (trained, untrained)]
        for key, name in names.items()
    ]
    return table(["output z", "trained", "untrained"], rows)


def examples(numbers: Mapping[str, Any], pictures: Pictures) -> str:
    """A few utterances, each with what was said over its picture."""
    parts = []
    for i, described in enumerate(numbers.get("examples", [])):
        drawn = html.picture(pictures, f"example_{i + 1}", f"Utterance {i + 1}")
        if not drawn:
            continue
        text = described["text"] or f"utterance {i + 1}"
        about = ", ".join(filter(None, (described["speaker"], f"{described['duration_s']:.1f} s")))
        parts.append(f"<h3>{escape(text)} <small>{escape(about)}</small></h3>{drawn}")
    return html.lead(captions.EXAMPLES) + "".join(parts) if parts else ""


def probes(numbers: Mapping[str, Any]) -> str:
    """A table for every task."""
    tables = "".join(_probe_table(task) for task in numbers.get("probes", []))
    if not tables:
        return ""
    return f'{html.lead(captions.PROBES)}<div class="tables">{tables}</div>'


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


def rejects(path: Path) -> str:
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
    summary = ", ".join(f"{n} × {escape(kind)}" for kind, n in kinds.most_common())
    rows = [(_place(r), str(r.get("reason", ""))) for r in rejects[:MANY_ROWS]]
    more = len(rejects) - MANY_ROWS
    tail = f"<p>and {more:,} more in <code>rejects.jsonl</code></p>" if more > 0 else ""
    lead = html.lead(f"{len(rejects):,} inputs could not be used: {summary}.")
    body = html.listing(rows) + tail
    return f"{lead}<details><summary>Which ones</summary>{body}</details>"


def _place(reject: Mapping[str, Any]) -> str:
    line = reject.get("line")
    return str(reject.get("file", "")) + ("" if line is None else f", line {line}")


def settings(path: Path, numbers: Mapping[str, Any]) -> str:
    """The config as one small table for each group, and the versions."""
    groups: dict[str, dict[str, Any]] = {}
    if path.exists():
        try:
            for name, value in dotted(json.loads(path.read_text(encoding="utf-8"))).items():
                group, _, key = name.rpartition(".")
                groups.setdefault(group or "run", {})[key] = value
        except json.JSONDecodeError:
            groups["config.json"] = {"": "not JSON"}
    if numbers.get("versions"):
        groups["versions"] = numbers["versions"]
    tables = "".join(
        html.listing(((key, plain(value)) for key, value in group.items()), name)
        for name, group in groups.items()
    )
    if not tables:
        return ""
    return f"<details><summary>All settings</summary><div class='groups'>{tables}</div></details>"
