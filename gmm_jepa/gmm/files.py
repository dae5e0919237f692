"""Clusters on disk: safetensors with the front end they belong to; and the published layouts."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.files import written_aside
from gmm_jepa.gmm.em import EMResult
from gmm_jepa.gmm.estimator import GaussianMixture
from gmm_jepa.gmm.kmeans import KMeans
from gmm_jepa.tensor_files import read_state, read_tensors, save_tensors

FORMAT_VERSION = 1
# The published code adds this to the stored covariances whenever it computes posteriors.
PUBLISHED_VARIANCE_OFFSET = 1e-6


class _Kind(NamedTuple):
    """One kind of file."""

    name: str
    """what it holds, in words and as the key of its description"""
    tensors: tuple[str, ...]

    @property
    def format(self) -> str:
        """Its mark."""
        return f"gmm-jepa-{self.name}"


MIXTURE = _Kind("mixture", ("weights", "means", "covariances"))
KMEANS = _Kind("kmeans", ("counts", "cluster_centers"))


def save_mixture(
    path: str | os.PathLike[str], gm: GaussianMixture, front_end: LogMelSpec | None = None
) -> None:
    """Write a fitted mixture; a reader sees the old file or the new one, never a part.

    float64 tensors ``weights`` (K,), ``means`` (K, D), ``covariances`` (K, D); metadata: format
    version, K, D, parameters of the fit, likelihood curve, front end, sha256 of the tensors.

    Args:
        path: of the file; its folder is made.
        gm: a fitted mixture.
        front_end: the features it was fitted on; `load_mixture` refuses any other.

    Raises:
        InputError: the mixture is not fitted, or the front end gives other features than it has.
        ImportError: safetensors is absent.
    """
    gm.check_fitted()
    description = {
        "n_components": gm.means_.shape[0],
        "n_features": gm.means_.shape[1],
        "tol": gm.tol,
        "max_iter": gm.max_iter,
        "variance_floor": gm.variance_floor,
        "n_init_frames": gm.n_init_frames,
        "random_state": gm.random_state,
        "converged": gm.converged_,
        "n_reseeded": gm.n_reseeded_,
        "n_frames": gm.n_frames_,
        "lower_bounds": gm.lower_bounds_,
        "one_pass": gm.one_pass_,
    }
    arrays = {name: getattr(gm, f"{name}_") for name in MIXTURE.tensors}
    _save(path, MIXTURE, arrays, description, front_end)


def load_mixture(
    path: str | os.PathLike[str], *, front_end: LogMelSpec | None = None
) -> GaussianMixture:
    """Read what `save_mixture` wrote.

    Args:
        path: of the file.
        front_end: the features it will be used on. A file that names another, or none, is
            refused.

    Raises:
        InputError: the file is missing, damaged, of another kind, or of another front end.
        ImportError: safetensors is absent.
    """
    arrays, description, stored_spec = _load(path, MIXTURE, front_end)
    gm = GaussianMixture.from_parameters(*(arrays[name] for name in MIXTURE.tensors))
    for name in ("tol", "max_iter", "variance_floor", "n_init_frames", "random_state"):
        setattr(gm, name, description[name])
    gm._set_course(
        EMResult(
            gm.mixture(dtype=torch.float64),
            lower_bounds=description["lower_bounds"],
            one_pass=description.get("one_pass", False),  # files of before do not say
            converged=description["converged"],
            n_reseeded=description["n_reseeded"],
            n_frames=description["n_frames"],
        )
    )
    gm.front_end_ = stored_spec
    return gm


def save_kmeans(
    path: str | os.PathLike[str], kmeans: KMeans, front_end: LogMelSpec | None = None
) -> None:
    """Write float64 ``cluster_centers`` (K, D) and ``counts`` (K,), as `save_mixture` does.

    Raises:
        InputError: nothing was fitted, or the front end gives other features than it has.
        ImportError: safetensors is absent.
    """
    kmeans.check_fitted()
    description = {
        "n_clusters": kmeans.n_clusters,
        "tol": kmeans.tol,
        "max_iter": kmeans.max_iter,
        "n_init_frames": kmeans.n_init_frames,
        "random_state": kmeans.random_state,
        "inertia": getattr(kmeans, "inertia_", None),
        "n_iter": getattr(kmeans, "n_iter_", None),
    }
    arrays = {name: getattr(kmeans, f"{name}_") for name in KMEANS.tensors}
    _save(path, KMEANS, arrays, description, front_end)


def load_kmeans(path: str | os.PathLike[str], *, front_end: LogMelSpec | None = None) -> KMeans:
    """Read what `save_kmeans` wrote; arguments and errors as in `load_mixture`."""
    arrays, description, stored_spec = _load(path, KMEANS, front_end)
    kmeans = KMeans(description["n_clusters"])
    for name in ("tol", "max_iter", "n_init_frames", "random_state"):
        setattr(kmeans, name, description[name])
    kmeans.set_centers(arrays["cluster_centers"], arrays["counts"])
    kmeans.inertia_, kmeans.n_iter_ = description["inertia"], description["n_iter"]
    kmeans.front_end_ = stored_spec
    return kmeans


def load_published_kmeans(path: str | os.PathLike[str]) -> KMeans:
    """Read a published ``kmeans.pt``: a dictionary with ``centroids`` (K, D), ``counts`` (K,).

    Raises:
        InputError: the file is missing, damaged or of another layout.
    """
    centroids, counts = _published(path, ("centroids", "counts"), "k-means")
    if centroids.ndim != 2 or counts.shape != centroids.shape[:1]:
        raise InputError(
            f"{path}: expected centroids (K, D) and counts (K,), got {centroids.shape} and "
            f"{counts.shape}"
        )
    kmeans = KMeans(centroids.shape[0])
    kmeans.set_centers(centroids, counts)
    return kmeans


def published_mixture(gm: GaussianMixture) -> dict[str, Any]:
    """A mixture in the published layout, for `torch.save`; the inverse of `load_published_mixture`.

    Logarithms are rounded from float64: float32's own differ by the processor in the last digit.
    """
    gm.check_fitted()
    arrays = (gm.means_, gm.covariances_ - PUBLISHED_VARIANCE_OFFSET, gm.weights_)
    means, covariances, weights = (torch.from_numpy(array).float() for array in arrays)
    return {
        "means": means,
        "covariances": covariances,
        "weights": weights,
        "log_vars": covariances.double().log().float(),
        "log_weights": weights.double().log().float(),
        "K": means.shape[0],
        "dim": means.shape[1],
    }


def published_kmeans(kmeans: KMeans) -> dict[str, Any]:
    """Centroids in the published layout; the inverse of `load_published_kmeans`."""
    kmeans.check_fitted()
    centroids = torch.from_numpy(kmeans.cluster_centers_).float()
    counts = torch.from_numpy(kmeans.counts_).float()
    K, D = centroids.shape
    return {"centroids": centroids, "counts": counts, "K": K, "dim": D}


def load_published_mixture(path: str | os.PathLike[str]) -> GaussianMixture:
    """Read a published ``gmm.pt``: a dictionary with ``means``, ``covariances`` and ``weights``.

    The variances are ``covariances + 1e-6``, as the published code uses them. Nothing is
    unpickled but tensors and plain values.

    Raises:
        InputError: the file is missing, damaged or of another layout.
    """
    weights, means, covariances = _published(path, MIXTURE.tensors, "mixture")
    try:
        return GaussianMixture.from_parameters(
            weights, means, covariances + PUBLISHED_VARIANCE_OFFSET
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _published(path: str | os.PathLike[str], names: tuple[str, ...], what: str) -> list[np.ndarray]:
    """Entries of a published file, float64; nothing is unpickled but tensors and plain values."""
    content = read_state(path, f"not a published {what}")
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path}: not a published {what}, no {missing[0]!r}")
    return [content[name].double().numpy() for name in names]


def _save(
    path: str | os.PathLike[str],
    kind: _Kind,
    arrays: dict[str, np.ndarray],
    description: dict[str, Any],
    front_end: LogMelSpec | None,
) -> None:
    n_features = arrays[kind.tensors[-1]].shape[1]
    if front_end is not None and front_end.n_mels != n_features:
        raise InputError(
            f"front_end: expected {n_features} mels as the {kind.name} has features, "
            f"got {front_end.describe()}"
        )
    described = {**description, "front_end": None if front_end is None else front_end.to_dict()}
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in kind.tensors}
    text = json.dumps(described, sort_keys=True, default=np.generic.item)
    metadata = {
        "format": kind.format,
        "format_version": str(FORMAT_VERSION),
        kind.name: text,
        "sha256": _hash(arrays, kind.tensors, text),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with written_aside(Path(path)) as aside:
        save_tensors(aside, tensors, metadata)


def _load(
    path: str | os.PathLike[str], kind: _Kind, front_end: LogMelSpec | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], LogMelSpec | None]:
    """Tensors, description and front end of a file of one kind."""
    metadata, tensors = read_tensors(path, f"not a {kind.name} file")
    if metadata.get("format") != kind.format:
        raise InputError(f"{path}: not a {kind.name} file (format {metadata.get('format')!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise InputError(
            f"{path}: format version {metadata.get('format_version')}, expected {FORMAT_VERSION}"
        )
    if any(tensor.dtype not in (torch.float32, torch.float64) for tensor in tensors.values()):
        raise InputError(f"{path}: damaged, its tensors are not of float32 or float64")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if set(arrays) != set(kind.tensors) or metadata.get("sha256") != _hash(
        arrays, kind.tensors, metadata.get(kind.name, "")
    ):
        raise InputError(f"{path}: damaged, its content does not match its sha256")
    description = json.loads(metadata[kind.name])
    stored = description["front_end"]
    stored_spec = None if stored is None else LogMelSpec.from_dict(stored)
    if front_end is not None and stored_spec != front_end:
        found = "names no front end (its `save` takes one)"
        if stored_spec is not None:
            found = f"has {stored_spec.describe()}"
        raise InputError(f"{path}: {found}; expected {front_end.describe()}")
    return arrays, description, stored_spec


def _hash(arrays: dict[str, np.ndarray], tensors: tuple[str, ...], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in tensors:
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
