"""A fit that is not finished, on disk: what it takes to go on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gmm_jepa.errors import InputError, require
from gmm_jepa.files import written_aside
from gmm_jepa.gmm.em import EMResult
from gmm_jepa.gmm.files import read_tensors
from gmm_jepa.ops import EMStatistics, Mixture

FORMAT = "gmm-jepa-partial-fit"


class PartialFit:
    """The state of a fit in a safetensors file, whole or absent.

    Args:
        path: of the file, beside the mixture to come.
        identity: plain JSON values that make a fit this one: settings, audio, front end.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))

    def save(self, result: EMResult, averages: EMStatistics | None = None) -> None:
        """Replace the file by this state."""
        safetensors = require("safetensors.torch", extra="train")
        assert result.reseeds is not None
        tensors = {**result.mixture._asdict(), "reseeds": result.reseeds}
        for name, average in ({} if averages is None else averages._asdict()).items():
            tensors[f"averages.{name}"] = average
        course = {
            "lower_bounds": result.lower_bounds,
            "converged": result.converged,
            "n_reseeded": result.n_reseeded,
            "n_frames": result.n_frames,
        }
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "course": json.dumps(course),
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with written_aside(self.path) as aside:
            aside.write_bytes(safetensors.save(tensors, metadata=metadata))

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
        averages = [tensors.get(f"averages.{name}") for name in EMStatistics._fields]
        result = EMResult(
            Mixture(*(tensors[name] for name in Mixture._fields)),
            reseeds=tensors["reseeds"],
            **json.loads(metadata["course"]),
        )
        return result, None if averages[0] is None else EMStatistics(*averages)
