"""A model in one safetensors file that says itself what it is."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from gmm_jepa.config import EncoderConfig, from_dict, to_dict
from gmm_jepa.errors import InputError
from gmm_jepa.files import written_aside
from gmm_jepa.models import JepaModel
from gmm_jepa.tensor_files import read_tensors, save_tensors

FORMAT = "gmm-jepa-model"


class StoredModel(NamedTuple):
    """What a model file holds."""

    model: JepaModel
    """In eval mode."""
    step: int
    """Optimiser steps behind it."""
    total_seconds: float
    """Audio seconds behind it, as the published checkpoints count them."""


def save_model(
    path: str | PathLike[str], model: JepaModel, *, step: int = 0, total_seconds: float = 0.0
) -> None:
    """Write all tensors of a model, and in the file's metadata its settings.

    Raises:
        ImportError: safetensors is absent.
    """
    description = {
        "encoder": to_dict(model.config),
        "n_clusters": model.n_clusters,
        "cluster_head": model.head_kind,
        "predicts": model.predicts,
        "step": step,
        "total_seconds": total_seconds,
    }
    metadata = {"format": FORMAT, "model": json.dumps(description)}
    with written_aside(Path(path)) as aside:
        save_tensors(aside, model.state_dict(), metadata)


def load_model(path: str | PathLike[str]) -> StoredModel:
    """Read what `save_model` wrote.

    Raises:
        InputError: the file is missing, damaged or of another kind.
        ImportError: safetensors is absent.
    """
    metadata, tensors = read_tensors(path, "not a safetensors file")
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not a model file (format {metadata.get('format')!r})")
    told = json.loads(metadata["model"])
    model = JepaModel(
        from_dict(EncoderConfig, told["encoder"], where=f"{path}: encoder"),
        told["n_clusters"],
        cluster_head=told["cluster_head"],
        predicts=told["predicts"],
    )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    return StoredModel(model.eval(), told["step"], told["total_seconds"])
