"""A fit that is not finished, on disk: what it takes to go on to the same bits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gmm_jepa.errors import InputError
from gmm_jepa.files import written_aside
from gmm_jepa.gmm.em import EMResult
from gmm_jepa.ops import EMStatistics, Mixture
from gmm_jepa.tensor_files import read_tensors, save_tensors

FORMAT = "gmm-jepa-partial-fit"
SUFFIX = ".partial"


def partial_of(path: Path) -> Path:
    """Where a fit is kept that is to end in `path`, so that it goes on after it was killed."""
    return path.with_name(path.name + SUFFIX)


class PartialFit:
    """The state of a fit in a safetensors file, whole or absent.

    Args:
        path: of the file, beside the mixture to come.
        identity: plain JSON values that make a fit this one: settings, audio, front end.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self._began = time.perf_counter()

    def save(self, result: EMResult, averages: EMStatistics | None = None) -> None:
        """Replace the file by this state."""
        assert result.reseeds is not None
        tensors = {**result.mixture._asdict(), "reseeds": result.reseeds}
        for name, average in ({} if averages is None else averages._asdict()).items():
            tensors[f"averages.{name}"] = average
        course = {
            "lower_bounds": result.lower_bounds,
            "one_pass": result.one_pass,
            "converged": result.converged,
            "n_reseeded": result.n_reseeded,
            "n_frames": result.n_frames,
        }
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "course": json.dumps(course),
            "seconds": repr(time.perf_counter() - self._began),
        }
        with written_aside(self.path) as aside:
            save_tensors(aside, tensors, metadata)

    def load(self) -> tuple[EMResult, EMStatistics | None] | None:
        """The state that `save` left; None if there is no file.

        Raises:
            InputError: the file is damaged, or belongs to another fit.
        """
        if not self.path.exists():
            return None
        refusal = "damaged; remove it to begin the fit anew"
        metadata, tensors = read_tensors(self.path, refusal)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{self.path}: not an unfinished fit; move it away")
        found = json.loads(metadata["identity"])
        odd = [name for name in self.identity if found.get(name) != self.identity[name]]
        if odd:
            raise InputError(
                f"{self.path}: an unfinished fit with other {', '.join(odd)}; give the same to go "
                "on with it, or remove the file to begin anew"
            )
        self._began -= float(metadata.get("seconds", 0.0))
        averages = [tensors.get(f"averages.{name}") for name in EMStatistics._fields]
        result = EMResult(
            Mixture(*(tensors[name] for name in Mixture._fields)),
            reseeds=tensors["reseeds"],
            **json.loads(metadata["course"]),
        )
        return result, None if averages[0] is None else EMStatistics(*averages)


def seconds_in(path: Path) -> float:
    """Seconds that the fit in a file was worked on; 0 where there is none, or it does not say."""
    try:
        return float(read_tensors(path, "damaged")[0]["seconds"])
    except (InputError, KeyError):
        return 0.0
