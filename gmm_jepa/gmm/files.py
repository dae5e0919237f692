"""A mixture on disk: safetensors with the front end it belongs to; and the published layout."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmm_jepa.errors import InputError, require
from gmm_jepa.features import LogMelSpec
from gmm_jepa.files import written_aside
from gmm_jepa.gmm.em import EMResult
from gmm_jepa.gmm.estimator import GaussianMixture
from gmm_jepa.ops import Mixture

FORMAT = "gmm-jepa-mixture"
FORMAT_VERSION = 1
# The published code adds this to the stored covariances whenever it computes posteriors.
PUBLISHED_VARIANCE_OFFSET = 1e-6

_TENSORS = ("weights", "means", "covariances")


def save_mixture(
    path: str | os.PathLike[str], gm: GaussianMixture, front_end: LogMelSpec | None = None
) -> None:
    """Write a fitted mixture; a reader sees the old file or the new one, never a part.

    float64 tensors ``weights`` (K,), ``means`` (K, D), ``covariances`` (K, D); metadata: format
    version, K, D, parameters of the fit, likelihood curve, front end, sha256 of the tensors.

    Args:
        path: of the file; its folder exists.
        gm: a fitted mixture.
        front_end: the features it was fitted on; `load_mixture` refuses any other.

    Raises:
        InputError: the mixture is not fitted, or the front end gives other features than it has.
        ImportError: safetensors is absent.
    """
    safetensors = require("safetensors.torch", extra="train")
    gm.check_fitted()
    if front_end is not None and front_end.n_mels != gm.n_features_in_:
        raise InputError(
            f"front_end: expected {gm.n_features_in_} mels as the mixture has features, "
            f"got {front_end.describe()}"
        )
    arrays = {name: np.ascontiguousarray(getattr(gm, f"{name}_")) for name in _TENSORS}
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
        "front_end": None if front_end is None else front_end.to_dict(),
    }
    text = json.dumps(description, sort_keys=True)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "mixture": text,
        "sha256": _hash(arrays, text),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with written_aside(Path(path)) as aside:
        aside.write_bytes(safetensors.save(tensors, metadata=metadata))


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
    metadata, arrays = _read(Path(path))
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not a mixture file (format {metadata.get('format')!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise InputError(
            f"{path}: format version {metadata.get('format_version')}, expected {FORMAT_VERSION}"
        )
    if set(arrays) != set(_TENSORS) or metadata.get("sha256") != _hash(
        arrays, metadata.get("mixture", "")
    ):
        raise InputError(f"{path}: damaged, its content does not match its sha256")
    description = json.loads(metadata["mixture"])
    stored = description["front_end"]
    stored_spec = None if stored is None else LogMelSpec.from_dict(stored)
    if front_end is not None and stored_spec != front_end:
        found = "names no front end" if stored_spec is None else f"has {stored_spec.describe()}"
        raise InputError(f"{path}: {found}; expected {front_end.describe()}")
    gm = _fitted(arrays["weights"], arrays["means"], arrays["covariances"])
    for name in ("tol", "max_iter", "variance_floor", "n_init_frames", "random_state"):
        setattr(gm, name, description[name])
    gm._set_course(
        EMResult(
            gm.mixture(dtype=torch.float64),
            lower_bounds=description["lower_bounds"],
            converged=description["converged"],
            n_reseeded=description["n_reseeded"],
            n_frames=description["n_frames"],
        )
    )
    gm.front_end_ = stored_spec
    return gm


def load_published(path: str | os.PathLike[str]) -> GaussianMixture:
    """Read a published ``gmm.pt``: a dictionary with ``means``, ``covariances`` and ``weights``.

    The variances are ``covariances + 1e-6``, as the published code uses them. Nothing is
    unpickled but tensors and plain values.

    Raises:
        InputError: the file is missing, damaged or of another layout.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a published mixture ({_first_line(error)})") from error
    missing = [name for name in _TENSORS if name not in content] if _is_dict(content) else _TENSORS
    if missing:
        raise InputError(f"{path}: not a published mixture, no {missing[0]!r}")
    weights, means, covariances = (content[name].double().numpy() for name in _TENSORS)
    if means.ndim != 2 or covariances.shape != means.shape or weights.shape != means.shape[:1]:
        raise InputError(
            f"{path}: expected weights (K,), means (K, D), covariances (K, D), got "
            f"{weights.shape}, {means.shape}, {covariances.shape}"
        )
    return _fitted(weights, means, covariances + PUBLISHED_VARIANCE_OFFSET)


def _fitted(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> GaussianMixture:
    gm = GaussianMixture(means.shape[0])
    with np.errstate(divide="ignore"):
        parameters = (np.log(weights), means, covariances)
    gm._set_mixture(Mixture(*(torch.from_numpy(np.array(p)) for p in parameters)))
    gm.weights_ = weights  # as stored, not through a logarithm and back
    return gm


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    safetensors = require("safetensors", extra="train")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            return dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a mixture file ({_first_line(error)})") from error


def _hash(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in _TENSORS:
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
