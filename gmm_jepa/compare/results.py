"""What the runs of a comparison found: numbers of each run, mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gmm_jepa.compare.plan import Planned, read_seconds
from gmm_jepa.config import Recipe, to_dict
from gmm_jepa.files import read_json
from gmm_jepa.objectives.build import initial_model
from gmm_jepa.report.words import dotted
from gmm_jepa.train.alarm import read_alarms
from gmm_jepa.train.metrics import read_metrics

FORMAT = 1


def compare(planned: Sequence[Planned]) -> dict[str, Any]:
    """The content of ``compare.json``: plain JSON values.

    Returns:
        ``steps``; ``batch_s``; ``seeds``; ``differences``, setting -> system -> value where the
        systems differ; ``systems``, each with ``parameters``, ``runs`` (one a seed: `run_numbers`)
        and ``summary`` (name -> ``mean``, ``spread``, ``n``).
    """
    systems: dict[str, Any] = {}
    recipes: dict[str, Recipe] = {}
    for p in planned:
        recipes.setdefault(p.name, p.recipe)
        systems.setdefault(p.name, {"parameters": parameters(p.recipe), "runs": []})
        systems[p.name]["runs"].append(run_numbers(p))
    for system in systems.values():
        system["summary"] = summarise([flat(run) for run in system["runs"]])
    first = planned[0].recipe
    return {
        "format": FORMAT,
        "steps": first.train.steps,
        "batch_s": first.data.batch_s,
        "seeds": sorted({p.seed for p in planned}),
        "differences": differences(recipes),
        "systems": systems,
    }


def run_numbers(planned: Planned) -> dict[str, Any]:
    """One finished run: ``seed``, ``steps``, ``audio_s_per_s``, ``seconds``, ``clusters``,
    ``embedding``, ``probes``, ``sample``, ``last`` line of metrics and ``alarms``."""
    found = read_json(planned.folder.evaluation)
    metrics = read_metrics(planned.folder.metrics)
    rates = [line["audio_s_per_s"] for line in metrics if line.get("audio_s_per_s")]
    return {
        "seed": planned.seed,
        "steps": metrics[-1]["step"],
        "audio_s_per_s": statistics.median(rates) if rates else None,
        "seconds": read_seconds(planned.folder),
        "sample": found["sample"],
        "clusters": found.get("clusters"),
        "embedding": found["embedding"],
        "probes": found["probes"],
        "last": metrics[-1],
        "alarms": [asdict(event) for event in read_alarms(planned.folder.alarms)],
    }


def flat(run: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a run that are averaged over seeds, under one name each.

    ``probe/<task>/<features>``, ``clusters/<name>``, ``head/<name>``, ``embedding/<name>``,
    ``untrained/<name>``, ``last/<meter>``, ``seconds/<stage>`` and ``audio_s_per_s``.
    """
    clusters = run["clusters"] or {}
    embedding = run["embedding"]
    groups: dict[str, Mapping[str, Any]] = {
        "clusters": clusters,
        "head": clusters.get("head") or {},
        "embedding": embedding,
        "untrained": embedding.get("untrained") or {},
        "last": run["last"],
        "seconds": run["seconds"],
        "": {"audio_s_per_s": run["audio_s_per_s"]},
    }
    for task in run["probes"]:
        groups[f"probe/{task['task']}"] = {r["features"]: r["accuracy"] for r in task["rows"]}
    return {
        f"{group}/{name}".lstrip("/"): float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def summarise(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | int | None]]:
    """Mean and spread (standard deviation, n - 1; None for one run) of every figure."""
    names = dict.fromkeys(name for run in runs for name in run)
    summary: dict[str, dict[str, float | int | None]] = {}
    for name in names:
        values = [run[name] for run in runs if name in run]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "spread": spread, "n": len(values)}
    return summary


def parameters(recipe: Recipe) -> dict[str, int]:
    """Weights of a system by part: ``encoder``, what is trained beside it, and ``teacher``, which
    is not; ``trained`` is the sum that the optimiser moves."""
    model = initial_model(recipe)
    counts = {
        "encoder" if name == "online" else name: sum(p.numel() for p in part.parameters())
        for name, part in model.named_children()
    }
    counts["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts


def differences(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same everywhere: dotted name -> what is compared -> value."""
    flattened = {name: dotted(to_dict(recipe)) for name, recipe in recipes.items()}
    names = dict.fromkeys(key for values in flattened.values() for key in values)
    found = {}
    for key in names:
        values = {name: flattened[name].get(key) for name in flattened}
        if key != "seed" and any(value != next(iter(values.values())) for value in values.values()):
            found[key] = values
    return found
