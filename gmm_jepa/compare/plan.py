"""Which runs a comparison consists of, and what they share: lists of audio, mixtures, centroids."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmm_jepa.config import Recipe, Sources, to_dict
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json, written_aside
from gmm_jepa.labelling import label_seconds
from gmm_jepa.pipeline import Run, open_run
from gmm_jepa.train import checkpoint
from gmm_jepa.train.folder import RunFolder

SECONDS = "seconds.json"


@dataclass(frozen=True)
class Planned:
    """One run: a system with a seed, in its own folder."""

    name: str
    """Of the system, or of whatever is compared."""
    seed: int
    folder: RunFolder
    recipe: Recipe

    @property
    def is_done(self) -> bool:
        """Trained to the last step, and evaluated since its settings last changed."""
        newest = checkpoint.newest(self.folder.checkpoints)
        if newest is None or newest.name != f"step_{self.recipe.train.steps:08d}":
            return False
        evaluation, config = self.folder.evaluation, self.folder.config
        return evaluation.exists() and evaluation.stat().st_mtime >= config.stat().st_mtime


def plan(out: Path, recipes: Mapping[str, Recipe], seeds: Sequence[int]) -> list[Planned]:
    """The runs of a comparison: ``out/<name>/seed<n>``.

    Args:
        out: folder of the comparison.
        recipes: what is compared, by name; their own seeds are replaced.
        seeds: of the repetitions.

    Raises:
        InputError: nothing to compare, a seed named twice, or `out` is something else.
    """
    if not recipes:
        raise InputError("systems: expected at least one, got none")
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds: expected different ones, got {' '.join(map(str, seeds))!r}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, found a file")
    if (out / "config.json").exists():
        raise InputError(f"{out} holds a run, not a comparison: give another folder")
    return [
        Planned(
            name,
            seed,
            RunFolder(out / name / f"seed{seed}"),
            dataclasses.replace(recipe, seed=seed),
        )
        for name, recipe in recipes.items()
        for seed in seeds
    ]


def prepare(planned: Sequence[Planned], sources: Sources, peers: Processes) -> None:
    """Open all folders, read the audio once, and make the labels that runs share once.

    What is taken from another run comes with the seconds it took to make, so that every system
    bears the cost it would have had alone.

    Raises:
        InputError: a folder holds something else, or the audio is no good.
    """
    runs = [open_run(p.folder.root, sources, p.recipe, peers) for p in planned]
    for p, run in zip(planned, runs):
        _share_lists(runs, run)
        if p.is_done:
            continue
        audio = run.audio()
        _share_labels(runs, run)
        run.targets(audio.train)


def _share_lists(runs: Sequence[Run], run: Run) -> None:
    """Take the lists of usable audio from a run that has them; the pipeline checks them."""
    for name in ("audio.json", "heldout_audio.json"):
        wanted = run.folder.root / name
        found = next((p for r in runs if (p := r.folder.root / name).exists()), None)
        if found is not None and not wanted.exists():
            _copy(found, wanted)


def _share_labels(runs: Sequence[Run], run: Run) -> None:
    """Take mixtures and centroids from runs that have made them with equal settings."""
    for path in _label_files(run):
        for other in runs:
            found = other.folder.root / path.name
            made = label_seconds(other.folder)
            equal = _label_settings(other) == _label_settings(run)
            if not path.exists() and equal and path.name in made and found.exists():
                _copy(found, path)
                times = label_seconds(run.folder) | {path.name: made[path.name]}
                write_json(run.folder.label_times, times)


def _label_files(run: Run) -> list[Path]:
    """What the first iteration of a run learns: clusters of log-mel frames."""
    objective = run.recipe.objective
    if not objective.anchored:
        return []
    if objective.labels == "kmeans":
        return [run.folder.kmeans]
    return [run.folder.mixture_of(i) for i in range(max(len(objective.ensemble), 1))]


def _label_settings(run: Run) -> list[Any]:
    """Runs on the same audio with equal ones make equal clusters of log-mel frames."""
    recipe = to_dict(run.recipe)
    return [recipe[name] for name in ("seed", "front_end", "mixture", "data")]


def _copy(source: Path, path: Path) -> None:
    with written_aside(path) as aside:
        shutil.copyfile(source, aside)


def read_seconds(folder: RunFolder) -> dict[str, float]:
    """Wall time of the stages of a run: ``labels``, ``train`` and ``evaluate``."""
    path = folder.root / SECONDS
    labels = label_seconds(folder)
    found = {"labels": sum(labels.values())} if labels else {}
    return found | (read_json(path) if path.exists() else {})


def add_seconds(folder: RunFolder, stage: str, seconds: float) -> None:
    """Add to the wall time of a stage."""
    path = folder.root / SECONDS
    found = read_json(path) if path.exists() else {}
    write_json(path, found | {stage: found.get(stage, 0.0) + seconds})
