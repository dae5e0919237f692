"""The report of a comparison: ``compare.html``, its pictures as PNGs, and ``compare.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gmm_jepa.compare import plots
from gmm_jepa.compare.plan import Planned
from gmm_jepa.compare.results import compare
from gmm_jepa.files import write_json
from gmm_jepa.report.html import cards, lead, page, picture, table
from gmm_jepa.report.pictures import Pictures, draw, save
from gmm_jepa.report.words import count, plain, show
from gmm_jepa.train.metrics import read_metrics

_MEASURES = (
    ("usage entropy (1: even use)", "head/entropy", ".3f", 1),
    ("clusters used", "head/used", ".0f", 1),
    ("adjacent frames in one cluster, %", "head/adjacent_consistency", ".1f", 100),
    ("agreement with the targets, %", "clusters/agreement", ".1f", 100),
    ("entropy of the targets, nats", "clusters/target_entropy", ".3f", 1),
    ("effective rank of z", "embedding/effective_rank", ".1f", 1),
    ("the same, untrained", "untrained/effective_rank", ".1f", 1),
    ("standard deviation of z", "embedding/std", ".3f", 1),
    ("mean cosine of z", "embedding/mean_cosine", ".3f", 1),
    ("the same, untrained", "untrained/mean_cosine", ".3f", 1),
    ("mean cosine at the front end, last line", "last/front_end_mean_cosine", ".3f", 1),
)
_COSTS = (
    ("making labels, s", "seconds/labels", ",.1f", 1),
    ("training, s", "seconds/train", ",.0f", 1),
    ("evaluation, s", "seconds/evaluate", ",.0f", 1),
    ("audio seconds a second", "audio_s_per_s", ",.1f", 1),
)

_LEAD = (
    "Every system saw the same audio for the same number of steps, with the same encoder and, for "
    "one seed, the same first weights of it, unless the table of differences says otherwise. "
    "± is the standard deviation over seeds."
)
_PROBES = (
    "One linear layer on frozen features of all layers, with the same budget for every row. The "
    "controls are the untrained encoder, and log-mel frames alone and with three frames each side: "
    "a system is worth something where it beats them. Two seeds can differ by several points."
)
_METERS = (
    "Measured on training frames; pale lines are single seeds. <b>A collapse</b> shows as a mean "
    "cosine near 1, a standard deviation near 0 and a usage entropy that falls or never rises, "
    "often at the front end first. <b>Effective rank is no verdict:</b> an untrained network has "
    "the highest."
)
_LOSSES = (
    "Losses of different systems are different quantities: compare the shape, not the height. "
    "A JEPA error that rises as the teacher's scale grows is by itself no failure."
)
_HELD_OUT = (
    "Held-out frames, none masked. Clusters are those of a system's own head, so a system without "
    "a head has none."
)
_COST = (
    "Wall time on this machine; runs that trained side by side shared it. Labels that several runs "
    "share were made once, and every one of them is charged what making them took."
)


def write(out: Path, planned: Sequence[Planned], *, jobs: int) -> Path:
    """Write numbers, pictures and page of finished runs; returns the page.

    Args:
        out: folder of the comparison.
        planned: its runs, all done.
        jobs: processes that trained at a time, for the table of costs.

    Raises:
        ImportError: matplotlib is not installed.
    """
    numbers = {**compare(planned), "jobs": jobs}
    write_json(out / "compare.json", numbers)
    histories: dict[str, list[Any]] = {}
    for p in planned:
        histories.setdefault(p.name, []).append(read_metrics(p.folder.metrics))
    systems = numbers["systems"]
    pictures = draw(
        lambda theme: {
            "compare_losses": plots.losses(theme, histories),
            "compare_meters": plots.meters(theme, histories),
            "compare_held_out": plots.held_out(theme, systems),
            "compare_probes": plots.probes(theme, systems),
        }
    )
    html = page(
        out.resolve().name,
        subtitle(numbers),
        _parts(numbers, pictures),
        "The numbers are in <code>compare.json</code>, the pictures in <code>plots/</code>; every "
        "system and seed has a run folder of its own.",
    )
    return save(out / "compare.html", html, pictures, of=["compare_*"])


def subtitle(numbers: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    systems, seeds = numbers["systems"], numbers["seeds"]
    sample = next(iter(systems.values()))["runs"][0]["sample"]
    return (
        f"{count(len(systems), 'system')}, {count(len(seeds), 'seed')}, "
        f"{numbers['steps']:,} steps of {numbers['batch_s']:g} s · evaluated on "
        f"{sample['heldout_s'] / 60:.1f} min of held-out speech"
    )


def _parts(numbers: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, str]]:
    systems = numbers["systems"]
    held_out = picture(pictures, "compare_held_out", "Measures on held-out speech", _HELD_OUT)
    meters = picture(pictures, "compare_meters", "Collapse meters over the steps", _METERS)
    losses = picture(pictures, "compare_losses", "Losses over the steps", _LOSSES)
    return [
        ("Result", _cards(systems) + lead(_LEAD)),
        ("Probes", _probes(systems, pictures)),
        ("Clusters and embedding", held_out + _measures(systems, _MEASURES, "held out")),
        ("Training", _alarms(systems) + meters + losses),
        ("Cost", lead(_COST) + _costs(numbers)),
        ("Differences", _differences(numbers)),
        ("Runs", _runs(systems)),
    ]


def with_spread(row: Mapping[str, Any] | None, form: str, *, scale: float = 1) -> str:
    """Mean and spread as text; a dash where there is none.

    >>> with_spread({"mean": 0.5, "spread": 0.25, "n": 2}, ".1f", scale=100)
    '50.0 ± 25.0'
    """
    if row is None:
        return "–"
    mean = show(row["mean"], form, scale=scale)
    return mean if row["spread"] is None else f"{mean} ± {show(row['spread'], form, scale=scale)}"


def _cards(systems: Mapping[str, Any]) -> str:
    """A card a system: its first probe, else the usage entropy."""
    tasks = plots.task_names(systems)
    shown = []
    for name, system in systems.items():
        summary = system["summary"]
        entropy = with_spread(summary.get("head/entropy"), ".2f")
        value, note = entropy, "cluster usage entropy"
        if tasks:
            found = summary.get(f"probe/{tasks[0]}/trained, all layers")
            value = with_spread(found, ".1f", scale=100)
            note = f"{tasks[0]}, linear probe, %; usage entropy {entropy}"
        shown.append((name, value, note))
    return cards(shown)


def _probes(systems: Mapping[str, Any], pictures: Pictures) -> str:
    tasks = plots.task_names(systems)
    if not tasks:
        return lead("The audio has no labels that a probe could learn.")
    columns = ("trained, all layers", "trained, output z", "untrained, all layers")
    tables = []
    for task in tasks:
        rows = [
            [name]
            + [
                with_spread(system["summary"].get(f"probe/{task}/{c}"), ".1f", scale=100)
                for c in columns
            ]
            for name, system in systems.items()
        ]
        rows += [
            [name, with_spread(row, ".1f", scale=100), "", ""]
            for name, row in plots.probe_rows(systems, task).items()
            if name.startswith("log-mel")
        ]
        found = next(
            t for s in systems.values() for t in s["runs"][0]["probes"] if t["task"] == task
        )
        note = (
            f"{found['n_classes']} classes, the commonest {100 * found['majority']:.1f} %. "
            f"Test: {found['split']} (first seed)."
        )
        tables.append(table([f"{task}, accuracy %", *columns], rows, note))
    drawn = picture(pictures, "compare_probes", "Probe accuracy")
    return lead(_PROBES) + drawn + "".join(tables)


def _measures(
    systems: Mapping[str, Any], measures: Sequence[tuple[str, str, str, float]], head: str
) -> str:
    """A row a measure, a column a system; measures that none has are left out."""
    rows = [
        [name, *_cells(systems, key, form, scale)]
        for name, key, form, scale in measures
        if any(key in s["summary"] for s in systems.values())
    ]
    return table([head, *systems], rows)


def _cells(systems: Mapping[str, Any], key: str, form: str, scale: float) -> list[str]:
    return [with_spread(s["summary"].get(key), form, scale=scale) for s in systems.values()]


def _alarms(systems: Mapping[str, Any]) -> str:
    rows = [
        [f"{name}, seed {run['seed']}", event["meter"], f"{event['step']:,}", event["reason"]]
        for name, system in systems.items()
        for run in system["runs"]
        for event in run["alarms"]
    ]
    if not rows:
        return lead("The collapse alarm did not go off in any run.")
    return table(["collapse alarm", "meter", "step", ""], rows)


def _costs(numbers: Mapping[str, Any]) -> str:
    systems = numbers["systems"]
    parts = dict.fromkeys(part for s in systems.values() for part in s["parameters"])
    least = min(s["parameters"]["trained"] for s in systems.values())
    rows = [
        [f"weights, {part.replace('_', ' ')}"]
        + [show(s["parameters"].get(part), ",") for s in systems.values()]
        for part in parts
    ]
    rows.append(
        ["trained weights over the fewest, %"]
        + [f"{100 * (s['parameters']['trained'] / least - 1):+.1f}" for s in systems.values()]
    )
    note = f"{count(numbers['jobs'], 'run')} at a time."
    return table(["weights", *systems], rows) + _measures(systems, _COSTS, "time") + lead(note)


def _differences(numbers: Mapping[str, Any]) -> str:
    found = numbers["differences"]
    if not found:
        return lead("No setting differs.")
    names = list(numbers["systems"])
    rows = [[key, *(plain(values.get(name)) for name in names)] for key, values in found.items()]
    return table(["setting", *names], rows, "All other settings are the same.")


def _runs(systems: Mapping[str, Any]) -> str:
    links = "".join(
        f'<li><a href="{escape(name)}/seed{run["seed"]}/report.html">{escape(name)}, '
        f"seed {run['seed']}</a></li>"
        for name, system in systems.items()
        for run in system["runs"]
    )
    return f"<ul>{links}</ul>"


def summary_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The result as a short table for the terminal; the first row is the head."""
    systems = numbers["systems"]
    measures = [
        (f"{task} accuracy %", f"probe/{task}/trained, all layers", ".1f", 100)
        for task in plots.task_names(systems)
    ]
    measures += [*_MEASURES[:3], _MEASURES[5], _MEASURES[8], *_COSTS[:2]]
    rows = [["measure", *systems]]
    rows += [[name, *_cells(systems, key, form, scale)] for name, key, form, scale in measures]
    for task in plots.task_names(systems):
        for name, row in plots.probe_rows(systems, task).items():
            if name not in systems:
                value = with_spread(row, ".1f", scale=100)
                rows.append([f"{task}, {name}", value, *[""] * (len(systems) - 1)])
    return rows
