"""Posteriors for callers with arrays or tensors, a fitted estimator or bare parameters."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.features import tensor_of
from gmm_jepa.gmm.estimator import GaussianMixture
from gmm_jepa.ops import Mixture

Array = TypeVar("Array", Tensor, np.ndarray)


def gmm_posterior(
    frames: Array,
    mixture: GaussianMixture | Mixture,
    *,
    temperature: float = 1.0,
    log: bool = False,
    precision: str = "fast",
    out_dtype: torch.dtype | None = None,
) -> Array:
    """Posterior probability of every component for every frame; NumPy in, NumPy out.

    Args:
        frames: (..., D) floating-point tensor on any device, or array.
        mixture: a fitted `GaussianMixture`, or bare parameters on the device of `frames`.
        temperature: the log-densities are divided by it before the softmax; above zero.
        log: give the logarithm instead.
        precision: ``"fast"`` (float32, within 1e-3) or ``"exact"`` (float64, within 1e-5).
        out_dtype: float64 for float64 frames and float32 otherwise, if not given.

    Returns:
        (..., K), differentiable in `frames` if these are a tensor.

    Raises:
        InputError: shapes, devices, temperature or precision make no sense.
        TypeError: `frames` are not floating-point numbers.
    """
    of_numpy = isinstance(frames, np.ndarray)
    if of_numpy and out_dtype == torch.bfloat16:
        raise InputError("out_dtype: NumPy has no bfloat16, give a tensor of frames")
    x = tensor_of(frames) if of_numpy else frames
    if isinstance(mixture, GaussianMixture):
        mixture = mixture.mixture_on(x.device if isinstance(x, Tensor) else torch.device("cpu"))
    out = ops.gmm_posterior(
        x, mixture, temperature=temperature, log=log, precision=precision, out_dtype=out_dtype
    )
    return out.numpy() if of_numpy else out
