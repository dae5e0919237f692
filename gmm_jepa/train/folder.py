"""The folder of a run: where each thing lies, and which settings it belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmm_jepa import locks
from gmm_jepa.config import Recipe, Sources, from_dict, to_dict
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json
from gmm_jepa.gmm.partial import SUFFIX
from gmm_jepa.train.checkpoint import steps

_FREE = (
    "recipe.data.workers",
    "recipe.data.max_bad_fraction",
    "recipe.train.shard",
    "recipe.train.checkpoint_every",
    "recipe.train.keep_checkpoints",
    "recipe.train.tensorboard",
    "recipe.train.alarm",
    "recipe.train.log_every",
    "recipe.evaluate.",
)
"""Settings that may change when a run goes on: the trained model does not depend on them."""


_PLACES = ("sources.audio", "sources.heldout_audio")
"""Where the audio lies: it may have moved, which whoever reads it finds out."""


class RunFolder:
    """Names inside a run folder; making one touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.mixture = self.root / "gmm.safetensors"
        self.kmeans = self.root / "kmeans.safetensors"
        self.label_times = self.root / "labels.json"
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.alarms = self.root / "alarms.jsonl"
        self.rejects = self.root / "rejects.jsonl"
        self.evaluation = self.root / "evaluation.json"
        self.report = self.root / "report.html"

    def mixture_of(self, number: int) -> Path:
        """Mixture `number`, from 0, of an ensemble; the first is `mixture`."""
        return self.mixture if number == 0 else self.root / f"gmm_{number + 1}.safetensors"

    def labels(self, iteration: int) -> Path:
        """The folder of the labels of iteration 2, 3, ..."""
        return self.root / f"labels_{iteration}"

    def open(self, sources: Sources, recipe: Recipe, *, may_have_moved: bool = False) -> None:
        """Start a run here, or go on with the one that is here.

        Until there is a mixture or a checkpoint, other settings replace those that are here.
        Later, with `may_have_moved`, other paths of as many sources are let pass: the caller
        compares their audio with the run's, and then calls `note`.

        Raises:
            InputError: the folder holds a run with other settings or audio, or something else.
        """
        wanted = _values(sources, recipe)
        if self.config.exists():
            changed = _differences(_values(*self.read()), wanted)
            binding = {n: line for n, line in changed.items() if not n.startswith(_FREE)}
            if binding and self.has_results():
                only_paths = may_have_moved and set(binding) <= set(_PLACES)
                if only_paths and self._has_lists_of(sources):
                    return
                raise InputError(
                    f"{self.root} holds a run with other settings ({'; '.join(binding.values())}): "
                    "give another folder, or the same settings to go on with it"
                )
            if binding:  # nothing was made yet but lists of the audio and part of a fit
                for path in (*self.root.glob("*audio.json"), *self.partial_fits()):
                    path.unlink()
            if changed:
                write_json(self.config, wanted)
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise InputError(f"{self.root} is not empty and holds no run: give another folder")
        write_json(self.config, wanted)

    def note(self, sources: Sources, recipe: Recipe) -> bool:
        """Write down where the audio lies now; whether it lay elsewhere before."""
        before, _ = self.read()
        if before == sources:
            return False
        write_json(self.config, _values(sources, recipe))
        return True

    def partial_fits(self) -> list[Path]:
        """States of fits that have not ended."""
        return list(self.root.glob(f"*{SUFFIX}"))

    def _has_lists_of(self, sources: Sources) -> bool:
        """Whether there are as many sources as before, and lists to compare their audio with."""
        before, _ = self.read()
        alike = len(before.audio) == len(sources.audio)
        alike &= len(before.heldout_audio) == len(sources.heldout_audio)
        lists = ["audio.json"] + ["heldout_audio.json"] * bool(sources.heldout_audio)
        return alike and all((self.root / name).exists() for name in lists)

    def has_results(self) -> bool:
        """Whether there is a mixture or a checkpoint, and so settings that are kept."""
        return self.mixture.exists() or self.kmeans.exists() or bool(steps(self.checkpoints))

    def read(self) -> tuple[Sources, Recipe]:
        """Audio and recipe of the run that is here.

        Raises:
            InputError: there is no run, or its config cannot be read.
        """
        if not self.root.exists():
            raise InputError(f"{self.root}: no such folder")
        if not self.config.exists():
            raise InputError(f"{self.root}: no run here ({self.config.name} is absent)")
        values = read_json(self.config)
        if not isinstance(values, dict) or set(values) != {"sources", "recipe"}:
            raise InputError(f"{self.config}: not the config of a run")
        return (
            from_dict(Sources, values["sources"], where=f"{self.config}: sources"),
            from_dict(Recipe, values["recipe"], where=f"{self.config}: recipe"),
        )


@contextlib.contextmanager
def held(root: Path, peers: Processes) -> Iterator[None]:
    """Hold a run folder for the processes of one run: the main one does, see `locks.held`.

    Raises:
        InputError: another run holds it, or it is no folder and cannot be made.
    """
    refusal = None
    with contextlib.ExitStack() as stack:
        if peers.is_main:
            try:
                stack.enter_context(locks.held(root))
            except InputError as error:
                refusal = str(error)
        refusal = peers.of_main(lambda: refusal)
        if refusal is not None:
            raise InputError(refusal)
        yield


def _values(sources: Sources, recipe: Recipe) -> dict[str, Any]:
    return {"sources": to_dict(sources), "recipe": to_dict(recipe)}


def _differences(found: Any, wanted: Any, where: str = "") -> dict[str, str]:
    """Dotted names of the settings that differ, and what differs in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        differing: dict[str, str] = {}
        for name in sorted(set(found) | set(wanted)):
            inner = f"{where}.{name}".strip(".")
            differing |= _differences(found.get(name), wanted.get(name), inner)
        return differing
    return {} if found == wanted else {where: f"{where}: there {found!r}, here {wanted!r}"}
