"""All trainings of a probe: every upstream, fold and learning rate, each result a file.

A folder holds ``config.json`` (what binds its results), ``results/<features>/*.json``,
``probe.json`` (the table) and the report. Started again, finished trainings are skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmm_jepa.downstream.data import Fold, Labelled
from gmm_jepa.downstream.features import Features, open_features
from gmm_jepa.downstream.fit import Problem, fit, merit
from gmm_jepa.downstream.settings import ProbeSettings
from gmm_jepa.downstream.tasks import Classification, Task
from gmm_jepa.downstream.upstreams import LogMel, Upstream
from gmm_jepa.errors import InputError
from gmm_jepa.files import finite, read_json, write_json
from gmm_jepa.progress import Bar

_FREE = ("learning_rates", "memory_mib", "disk_mib")
"""Settings that may change between two calls: no single result depends on them."""


def with_controls(trained: Sequence[Upstream]) -> list[Upstream]:
    """The upstreams, each followed by its untrained self, and log-mel at the end.

    Upstreams of equal settings share one untrained encoder.
    """
    rows: list[Upstream] = []
    seen: set[str] = set()
    for upstream in trained:
        rows.append(upstream)
        settings = json.dumps(upstream.describe(), sort_keys=True)
        fresh = None if settings in seen else upstream.untrained()
        seen.add(settings)
        rows += [] if fresh is None else [fresh]
    hops = dict.fromkeys(upstream.hop_samples for upstream in trained)
    return [*rows, LogMel(next(iter(hops), 320))]


def open_folder(out: Path, task: str, settings: ProbeSettings, data: Labelled) -> None:
    """Start a folder of results, or go on with the one that is there.

    Until there is a result, other settings or data replace those that are here.

    Raises:
        InputError: it holds results of other settings or data, or something else.
    """
    bound = dataclasses.asdict(settings)
    for name in _FREE:
        del bound[name]
    wanted = {"task": task, "settings": bound, "data": data.fingerprint}
    path = out / "config.json"
    found = read_json(path) if path.exists() else None
    if isinstance(found, dict) and found.keys() == wanted.keys():
        different = [key for key in wanted if found[key] != json.loads(json.dumps(wanted))[key]]
        if not different:
            return
        if any((out / "results").rglob("*.json")):
            raise InputError(
                f"{out} holds results with other {' and '.join(different)}: give another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no results: give another folder")
    write_json(path, wanted)


def run(
    out: Path,
    upstreams: Sequence[Upstream],
    data: Labelled,
    task: Task,
    settings: ProbeSettings,
    device: torch.device,
    *,
    heard: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Do what is not done yet, and gather everything in ``probe.json``.

    Args:
        out: opened folder.
        upstreams: rows of the table, with their controls.
        data, task, settings: what and how.
        device: where everything is computed.
        heard: utterances of the test part that an upstream was pretrained on, by its name, as far
            as that is known.

    Returns:
        The content of ``probe.json``.

    Raises:
        InputError: a result is of another upstream of the same name, or audio is unreadable.
    """
    names = [upstream.name for upstream in upstreams]
    if len(set(names)) != len(names):
        raise InputError(f"upstream: expected different names, got {', '.join(names)}")
    rows = []
    for upstream in upstreams:
        job = _Job(out, upstream, data, task, settings, device)
        rows.append(_row(job, job.results()))
        upstream.cpu()
    numbers: dict[str, Any] = {
        "task": task.name,
        "scores": list(task.scores),
        "higher_is_better": task.higher_is_better,
        "classes": list(task.classes) if isinstance(task, Classification) else [],
        "settings": dataclasses.asdict(settings),
        "data": {
            "utterances": len(data.answers),
            "hours": data.corpus.total_s / 3600,
            "folds": [
                {"name": f.name, "train": len(f.train), "dev": len(f.dev), "test": len(f.test)}
                for f in data.folds
            ],
            "heard": dict(heard or {}),
        },
        "rows": rows,
    }
    numbers = finite(numbers)
    write_json(out / "probe.json", numbers)
    return numbers


class _Job:
    """One upstream; its features are computed when the first training asks for them."""

    def __init__(
        self,
        out: Path,
        upstream: Upstream,
        data: Labelled,
        task: Task,
        settings: ProbeSettings,
        device: torch.device,
    ) -> None:
        self.upstream, self.data, self.task = upstream.to(device), data, task
        self.settings, self.device = settings, device
        self.folder = out / "results" / _safe(upstream.name)
        self.cache = out / "cache" / f"{_safe(upstream.name)}.npy"
        self.fingerprint = upstream.fingerprint()
        self._features: Features | None = None

    def results(self) -> list[list[dict[str, Any]]]:
        """Of each learning rate, the result of each fold."""
        try:
            return [
                [self._result(fold, rate) for fold in self.data.folds]
                for rate in self.settings.learning_rates
            ]
        finally:
            self._features = None
            self.cache.unlink(missing_ok=True)
            if self.cache.parent.is_dir() and not any(self.cache.parent.iterdir()):
                self.cache.parent.rmdir()

    def _result(self, fold: Fold, rate: float) -> dict[str, Any]:
        """From its file, or computed and written there."""
        tag = f"fold_{_safe(fold.name)}_" if len(self.data.folds) > 1 else ""
        path = self.folder / f"{tag}lr_{rate!r}.json"
        if path.exists():
            return self._known(path)
        problem = Problem(self.features(), self.data, self.task, self.device)
        of_fold = f", {fold.name}" if tag else ""
        with Bar(f"{self.upstream.name}{of_fold}, lr {rate:g}", "step") as bar:
            fitted = fit(problem, fold, self.settings, rate, progress=bar)
        told = {name: value for name, value in vars(fitted).items() if name != "hypotheses"}
        result = finite(
            {
                "features": self.upstream.name,
                "kind": self.upstream.kind,
                "fingerprint": self.fingerprint,
                "fold": fold.name,
                "learning_rate": rate,
                **told,
                "predictions": [
                    {"id": self.data.ids[i], "reference": self.data.answers[i], "hypothesis": h}
                    for i, h in zip(fold.test, fitted.hypotheses)
                ],
            }
        )
        write_json(path, result)
        return result

    def features(self) -> Features:
        """Of the whole corpus."""
        if self._features is None:
            self._features = open_features(
                self.upstream,
                self.data.corpus,
                memory_mib=self.settings.memory_mib,
                disk_mib=self.settings.disk_mib,
                path=self.cache,
            )
        return self._features

    def _known(self, path: Path) -> dict[str, Any]:
        result = read_json(path)
        if not isinstance(result, dict) or "predictions" not in result:
            raise InputError(f"{path}: not a result")
        if result["fingerprint"] != self.fingerprint:
            raise InputError(
                f"{path} is of another {self.upstream.name} (other weights): give another folder"
            )
        return result


def _row(job: _Job, results: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A line of the table: the learning rate that is best on the dev part, and what it came to."""
    merits = [_mean_merit(folds, job.task) for folds in results]
    chosen = results[max(range(len(results)), key=lambda i: merits[i])]
    worked = all(result["best"] is not None for result in chosen)

    def mean(part: str, prefix: str = "") -> dict[str, float] | None:
        keys = ("loss", *job.task.scores)
        if not worked:
            return None
        found = {key: [result[part][prefix + key] for result in chosen] for key in keys}
        return {k: None if None in v else float(np.mean(v)) for k, v in found.items()}

    return {
        "features": job.upstream.name,
        "kind": job.upstream.kind,
        "layers": job.upstream.n_layers,
        "dimensions": job.upstream.width,
        "learning_rate": chosen[0]["learning_rate"],
        "dev": mean("best", "dev_"),
        "test": mean("test"),
        "layer_weights": np.mean([r["layer_weights"] for r in chosen], axis=0).tolist(),
        "trained_weights": chosen[0]["n_weights"],
        "seconds": sum(r["seconds"] for folds in results for r in folds),
        "curves": {
            repr(folds[0]["learning_rate"]): [result["curve"] for result in folds]
            for folds in results
        },
        "predictions": [p for result in chosen for p in result["predictions"]],
    }


def _mean_merit(folds: list[dict[str, Any]], task: Task) -> tuple[float, ...]:
    found = [
        (-math.inf, -math.inf) if r["best"] is None else merit(r["best"], task, "dev_")
        for r in folds
    ]
    return tuple(np.mean(found, axis=0).tolist())


def _safe(name: str) -> str:
    """A file name; names that differ in odd characters only stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
    return plain if plain == name else f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
