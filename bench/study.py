"""Turn one factor of the training at a time: ordinary runs, one JSON line each, one table.

python -m bench.study --out runs/study --seeds 0 1 --jobs 2 --factors base linear-head hard \\
    --corpus demo=runs/demo/speech/train.jsonl,runs/demo/speech/test.jsonl \\
    --corpus digits=digits.jsonl

A corpus is NAME=TRAIN or NAME=TRAIN,HELDOUT. Started again, it goes on, and what has its line in
``bench/results/study.jsonl`` is not run again. Runs of one corpus and seed share the lists of
audio, the mixture and the centroids. Every line holds whatever probes the labels of its corpus
allow: a corpus of one speaker with sentences for transcripts allows none, since linear probes need
classes of frames or of utterances; there only the measures of clusters and embeddings tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import RESULTS, append, surroundings
from gmm_jepa.compare.jobs import StoppedError, run_all
from gmm_jepa.compare.plan import Planned, plan, prepare
from gmm_jepa.compare.results import flat, run_numbers
from gmm_jepa.config import Recipe, Sources
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.presets import PRESETS, SYSTEMS, preset
from gmm_jepa.train.metrics import read_metrics

NAME = "study"
BASE = "base"
Settings = Mapping[str, Any]

FACTORS: dict[str, Settings] = {
    BASE: {},
    "linear-head": {"objective.cluster_head": "linear"},
    "unmasked-0": {"objective.unmasked_weight": 0.0},
    "aligned": {"objective.align_targets": True},
    "temperature-2": {"objective.temperature": 2.0},
    "temperature-5": {"objective.temperature": 5.0},
    "input-mask": {"objective.mask_place": "input"},
    "ema-rising": {"train.teacher_decay_start": 0.95},
    "lambda-constant": {"objective.anchor_schedule": "constant"},
    "lambda-small": {"objective.anchor_start": 0.1},
    "hard": {"objective.targets": "hard"},
    "jepa-0": {"objective.jepa_weight": 0.0},
    "jepa-0.1": {"objective.jepa_weight": 0.1},
    "components-1024": {"mixture.n_components": 1024},
    "linear-aligned": {"objective.cluster_head": "linear", "objective.align_targets": True},
    "linear-aligned-1024": {
        "objective.cluster_head": "linear",
        "objective.align_targets": True,
        "mixture.n_components": 1024,
    },
    "wavlm-style-aligned": {"system": "wavlm-style", "objective.align_targets": True},
}
"""Name -> settings over the start. A setting `system` takes that system's recipe instead of the
GMM-anchored one; the systems by themselves are factors by their names."""

START: Settings = {"objective.cluster_head": "mlp", "objective.align_targets": False}
"""What the study turns from: the published head and the published place of the targets, whatever
the presets have become by it."""

_COLUMNS = (
    ("usage entropy", "usage_entropy", ".3f"),
    ("target entropy", "target_entropy", ".3f"),
    ("effective rank", "effective_rank", ".1f"),
    ("mean cosine", "mean_cosine", ".3f"),
    ("wall, s", "wall_s", ".0f"),
)


def recipe_of(factor: str, preset_name: str, steps: int | None) -> Recipe:
    """The recipe of a factor.

    Raises:
        InputError: there is no such factor.
    """
    if factor not in FACTORS and factor not in SYSTEMS:
        known = ", ".join([*FACTORS, *SYSTEMS])
        raise InputError(f"factors: expected some of {known}, got {factor!r}")
    settings = dict(FACTORS.get(factor, {"system": factor}))
    system = settings.pop("system", None)
    start = override(preset(preset_name), START)
    recipe = override(SYSTEMS[system](start) if system else start, settings)
    return recipe if steps is None else override(recipe, {"train.steps": steps})


def override(config: Any, settings: Settings) -> Any:
    """A frozen, nested dataclass with other values, given by dotted names.

    Raises:
        InputError: there is no such setting, or the dataclass refuses the value.
    """
    changed: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if not hasattr(config, head):
            raise InputError(f"{name}: no such setting")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changed[head] = value
    changed |= {head: override(getattr(config, head), inner) for head, inner in nested.items()}
    return dataclasses.replace(config, **changed)


def sources_of(corpus: str) -> tuple[str, Sources]:
    """``NAME=TRAIN[,HELDOUT]`` as a name and its audio.

    Raises:
        InputError: it is of another form.
    """
    name, _, paths = corpus.partition("=")
    train, _, heldout = paths.partition(",")
    if not name or not train:
        raise InputError(f"corpus: expected NAME=TRAIN or NAME=TRAIN,HELDOUT, got {corpus!r}")
    absolute = [str(Path(path).resolve()) for path in (train, heldout) if path]
    return name, Sources(audio=(absolute[0],), heldout_audio=tuple(absolute[1:]))


def line_of(corpus: str, planned: Planned) -> dict[str, Any]:
    """What is kept of a finished run."""
    run = run_numbers(planned)
    figures = flat(run)
    return {
        "name": NAME,
        **surroundings(),
        "command": " ".join(["python -m bench.study", *sys.argv[1:]]),
        "corpus": corpus,
        "factor": planned.name,
        "settings": dict(FACTORS.get(planned.name, {"system": planned.name})),
        "seed": planned.seed,
        "steps": run["steps"],
        "batch_s": planned.recipe.data.batch_s,
        "probes": {
            task["task"]: {row["features"]: row["accuracy"] for row in task["rows"]}
            | {"majority": task["majority"]}
            for task in run["probes"]
        },
        "usage_entropy": figures.get("head/entropy"),
        "target_entropy": figures.get("clusters/target_entropy"),
        "effective_rank": figures.get("embedding/effective_rank"),
        "mean_cosine": figures.get("embedding/mean_cosine"),
        "front_end_mean_cosine": figures.get("last/front_end_mean_cosine"),
        "alarms": [event["meter"] for event in run["alarms"]],
        "label_s": figures.get("seconds/labels"),
        "wall_s": figures.get("seconds/train"),
        "audio_s_per_s": run["audio_s_per_s"],
    }


def key_of(line: Mapping[str, Any]) -> str:
    """Lines with equal keys are of the same run."""
    names = ("corpus", "factor", "settings", "seed", "steps", "batch_s")
    return json.dumps([line[name] for name in names], sort_keys=True)


def planned_key(corpus: str, planned: Planned) -> str:
    """The key that the line of a run will have."""
    return key_of(
        {
            "corpus": corpus,
            "factor": planned.name,
            "settings": dict(FACTORS.get(planned.name, {"system": planned.name})),
            "seed": planned.seed,
            "steps": planned.recipe.train.steps,
            "batch_s": planned.recipe.data.batch_s,
        }
    )


def table(lines: Sequence[Mapping[str, Any]], corpus: str) -> str:
    """Markdown: a row a factor, mean over seeds, difference to the base over the seeds of both."""
    mine = [line for line in lines if line["corpus"] == corpus]
    tasks = list(dict.fromkeys(task for line in mine for task in line["probes"]))
    head = ["factor", "seeds", *(part for t in tasks for part in (f"{t} %", "± base"))]
    rows = [[*head, *(name for name, _, _ in _COLUMNS)]]
    by_factor: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in mine:
        by_factor.setdefault(line["factor"], {})[line["seed"]] = line
    for factor, runs in by_factor.items():
        cells = [factor, str(len(runs))]
        for task in tasks:
            cells += _against_base(runs, by_factor.get(BASE, {}), task)
        for _, name, form in _COLUMNS:
            values = [run[name] for run in runs.values() if run[name] is not None]
            cells.append(format(statistics.fmean(values), form) if values else "–")
        rows.append(cells)
    for control in ("untrained, all layers", "log-mel", "log-mel, 3 frames each side"):
        found = [[_accuracy(line, task, control) for line in mine] for task in tasks]
        cells = [_mean(values) for values in found]
        spread = [part for cell in cells for part in (cell, "")]
        if any(cells):
            rows.append([control, "", *spread, *[""] * len(_COLUMNS)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _accuracy(line: Mapping[str, Any], task: str, features: str) -> float | None:
    value = line["probes"].get(task, {}).get(features)
    return None if value is None else 100 * value


def _mean(values: Sequence[float | None], form: str = ".1f") -> str:
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else ""


def _against_base(
    runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], task: str
) -> list[str]:
    """Mean accuracy, and the mean difference to the base over the seeds that both have."""
    features = "trained, all layers"
    own = {seed: _accuracy(run, task, features) for seed, run in runs.items()}
    differences = [
        value - other
        for seed, value in own.items()
        if value is not None
        and seed in base
        and (other := _accuracy(base[seed], task, features)) is not None
    ]
    return [_mean(list(own.values())), _mean(differences, "+.1f")]


def study(options: argparse.Namespace, results: Path = RESULTS) -> None:
    """Run what has no line yet, corpus by corpus, and print the tables."""
    file = results / f"{NAME}.jsonl"
    recipes = {f: recipe_of(f, options.preset, options.steps) for f in options.factors}
    for text in options.corpus:
        corpus, sources = sources_of(text)
        done = {key_of(line) for line in read_metrics(file)}
        planned = [
            p
            for p in plan(options.out / corpus, recipes, options.seeds)
            if planned_key(corpus, p) not in done
        ]
        with processes() as peers:
            prepare(planned, sources, peers)
        for p in [p for p in planned if p.is_done]:
            append(NAME, line_of(corpus, p), results)
        run_all(
            [p for p in planned if not p.is_done],
            jobs=options.jobs,
            on_done=lambda p, corpus=corpus: append(NAME, line_of(corpus, p), results),
        )
        print(f"\n{corpus}\n\n{table(read_metrics(file), corpus)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", action="append", required=True, metavar="NAME=TRAIN[,HELDOUT]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), metavar="FACTOR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--preset", default="cpu", choices=list(PRESETS))
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    try:
        options = parser.parse_args(arguments)
        study(options, options.results)
    except (InputError, StoppedError, ChildProcessError) as error:
        sys.exit(f"study: {error}")


if __name__ == "__main__":
    main()
