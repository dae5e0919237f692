"""The folder of a run: where each thing lies, and which settings it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmm_jepa.config import Recipe, Sources, from_dict, to_dict
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json


class RunFolder:
    """Names inside a run folder; making one touches nothing on disk."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.mixture = self.root / "gmm.safetensors"
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.rejects = self.root / "rejects.jsonl"
        self.evaluation = self.root / "evaluation.json"
        self.report = self.root / "report.html"

    def open(self, sources: Sources, recipe: Recipe) -> None:
        """Start a run here, or go on with the one that is here.

        Raises:
            InputError: the folder holds a run with other settings or audio, or something else.
        """
        wanted = {"sources": to_dict(sources), "recipe": to_dict(recipe)}
        if self.config.exists():
            changed = _differences(read_json(self.config), wanted)
            if changed:
                raise InputError(
                    f"{self.root} holds a run with other settings ({'; '.join(changed)}): "
                    "give another folder, or the same settings to go on with it"
                )
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise InputError(f"{self.root} is not empty and holds no run: give another folder")
        write_json(self.config, wanted)

    def read(self) -> tuple[Sources, Recipe]:
        """Audio and recipe of the run that is here.

        Raises:
            InputError: there is no run, or its config cannot be read.
        """
        if not self.config.exists():
            raise InputError(f"{self.root}: no run here ({self.config.name} is absent)")
        values = read_json(self.config)
        if not isinstance(values, dict) or set(values) != {"sources", "recipe"}:
            raise InputError(f"{self.config}: not the config of a run")
        return (
            from_dict(Sources, values["sources"], where="sources"),
            from_dict(Recipe, values["recipe"], where="recipe"),
        )


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Dotted names of the settings that differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = sorted(set(found) | set(wanted))
        return [
            line
            for name in names
            for line in _differences(
                found.get(name), wanted.get(name), f"{where}.{name}".lstrip(".")
            )
        ]
    return [] if found == wanted else [f"{where}: there {found!r}, here {wanted!r}"]
