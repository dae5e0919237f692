"""Files of the published code (arXiv 2602.09040) to this project's, and back; nothing is unpickled.

| published | here |
| --- | --- |
| ``portable_step*.pt`` with its ``config.json`` | a model file, or the newest checkpoint of a run |
| ``gmm.pt`` | a mixture file |
| ``kmeans.pt`` | a k-means file |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.files import refuse_existing, write_json, written_aside
from gmm_jepa.gmm import files as clusters
from gmm_jepa.model_file import FORMAT, StoredModel, load_model, save_model
from gmm_jepa.models.published import (
    export_published,
    load_published,
    published_config,
    read_states,
)
from gmm_jepa.tensor_files import read_tensors, save_state
from gmm_jepa.train.trained import at_path


def convert(source: Path, out: Path, *, config: Path | None = None) -> str:
    """Convert one file; its kind is read from it, the direction is given by the names.

    Args:
        source: a published ``.pt``, a ``.safetensors`` file of this project, a run folder, or one
            of its checkpoints.
        out: ``.safetensors`` for a published source, ``.pt`` else; must not exist. A model's
            ``config.json`` is written beside its ``.pt``.
        config: of a published model, and of nothing else; default: ``config.json`` beside it.

    Returns:
        What was converted, in a few words.

    Raises:
        InputError: the source is of no known kind, does not fit its config, has no counterpart, or
            `out` exists or is named wrongly. Nothing is written then.
    """
    published = source.suffix == ".pt"
    wanted = ".safetensors" if published else ".pt"
    if out.suffix != wanted:
        raise InputError(f"out: expected a name that ends in {wanted}, got {out}")
    refuse_existing(out)
    if published:
        return _to_project(source, out, config)
    _refuse_config(config, source)
    return _to_published(source, out)


def _to_project(source: Path, out: Path, config: Path | None) -> str:
    states = read_states(source)
    if "means" in states:
        _refuse_config(config, source)
        mixture = clusters.load_published_mixture(source)
        clusters.save_mixture(out, mixture, _front_end(mixture.means_))
        return "mixture"
    if "centroids" in states:
        _refuse_config(config, source)
        kmeans = clusters.load_published_kmeans(source)
        clusters.save_kmeans(out, kmeans, _front_end(kmeans.cluster_centers_))
        return "k-means centroids"
    if not {"online", "model"} & set(states):
        raise InputError(
            f"{source}: no published kind has the entries {', '.join(map(str, states))}"
        )
    model = load_published(source, config or source.with_name("config.json"))
    step, seconds = states.get("step", 0), states.get("total_seconds", 0.0)
    save_model(out, model, step=int(step), total_seconds=float(seconds))
    return "model"


def _front_end(centres: np.ndarray) -> LogMelSpec | None:
    """What the published code clusters, where centres (K, D) have as many features."""
    return LogMelSpec() if centres.shape[1] == LogMelSpec().n_mels else None


def _refuse_config(config: Path | None, source: Path) -> None:
    if config is not None:
        raise InputError(f"config: expected with a published model only, got {source}")


def _to_published(source: Path, out: Path) -> str:
    if source.is_dir():
        _write_model(_checkpoint(source), out)
        return "checkpoint"
    kind = read_tensors(source, "not a safetensors file")[0].get("format")
    if kind == FORMAT:
        _write_model(load_model(source), out)
        return "model"
    writers: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        clusters.MIXTURE.format: (
            "mixture",
            lambda: clusters.published_mixture(clusters.load_mixture(source)),
        ),
        clusters.KMEANS.format: (
            "k-means centroids",
            lambda: clusters.published_kmeans(clusters.load_kmeans(source)),
        ),
    }
    if kind not in writers:
        raise InputError(f"{source}: not a file of this project (format {kind!r})")
    name, content = writers[kind]
    _write(content(), out)
    return name


def _checkpoint(path: Path) -> StoredModel:
    trained = at_path(path)
    seconds = trained.step * trained.recipe.data.batch_s
    return StoredModel(trained.model(), trained.step, seconds)


def _write_model(stored: StoredModel, out: Path) -> None:
    settings = out.with_name("config.json")
    if settings.exists():
        raise InputError(f"{settings} exists already: give every model a folder of its own")
    config = published_config(stored.model)
    states = export_published(stored.model, step=stored.step, total_seconds=stored.total_seconds)
    with written_aside(settings) as aside:
        write_json(aside, config)
        _write(states, out)


def _write(states: dict[str, Any], out: Path) -> None:
    with written_aside(out) as aside:
        save_state(aside, _owned(states))


def _owned(value: Any) -> Any:
    """Tensors with storage of their own, so that views do not carry whole parents to disk."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _owned(inner) for name, inner in value.items()}
    return value
