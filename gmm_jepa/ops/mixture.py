"""The parameters of a diagonal Gaussian mixture, and its log-density as one matrix product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import kind_of

# Values of the (rows, K) block of log-densities alive at one time inside an op: 8 MB in float64.
# Of 128..4096 rows at K = 256 and 1,024, D = 80 on two Zen 4 cores, 2^20 values was the fastest
# EM (73 k frames/s at K = 1,024; 2^17: 62 k; 2^22: 72 k) and it bounds the memory of every op.
CHUNK_VALUES = 1 << 20


class Mixture(NamedTuple):
    """Frozen parameters of a diagonal Gaussian mixture: float32 or float64, on one device."""

    log_weights: Tensor
    """(K,) log of the component weights; minus infinity takes a component out."""
    means: Tensor
    """(K, D)"""
    variances: Tensor
    """(K, D), all above zero"""


class Ensemble(NamedTuple):
    """Several mixtures whose posteriors are averaged: p_k = sum_m share_m p_mk.

    Component k of every mixture must stand for the same cluster, as where all were fitted from one
    start: the average is taken component by component. Its density is that of the mean,
    p(x) = sum_m share_m p_m(x).
    """

    mixtures: tuple[Mixture, ...]
    """at least one, all of the same K and D, on one device"""
    shares: tuple[float, ...]
    """of each mixture: not negative, not all zero; they are brought to a sum of 1"""


class Quadratic(NamedTuple):
    """log p(x, k) as ``[z, z^2] @ weight + bias`` with ``z = (x - centre) * inverse_scale``.

    One affine for all components brings the mixture to zero mean and unit variance, so that the
    expanded square ``x^2/v - 2xm/v + m^2/v`` cancels as little as it can.
    """

    centre: Tensor  # (D,)
    inverse_scale: Tensor  # (D,)
    weight: Tensor  # (2 D, K)
    bias: Tensor  # (K,)

    def features(self, frames: Tensor) -> Tensor:
        """Frames (n, D) of any float type -> ``[z, z^2]`` (n, 2 D) in this form's dtype."""
        z = ((frames - self.centre) * self.inverse_scale).to(self.weight.dtype)
        return torch.cat((z, z.square()), dim=1)

    def log_joint(self, frames: Tensor) -> Tensor:
        """Frames (n, D) -> log p(x, k) (n, K)."""
        return torch.addmm(self.bias, self.features(frames), self.weight)


def quadratic(mixture: Mixture, dtype: torch.dtype) -> Quadratic:
    """Fold a mixture into its quadratic form; folded in float64, then rounded once to `dtype`.

    The affine is rounded first and everything else is made from the rounded one, so rounding it
    costs nothing.
    """
    log_weights, means, variances = (p.double() for p in mixture)
    share = torch.softmax(log_weights, 0)
    centre = (share @ means).to(dtype)
    spread = variances + (means - centre).square()
    inverse_scale = (share @ spread).rsqrt().to(dtype)
    m = (means - centre) * inverse_scale
    precision = 1.0 / (variances * inverse_scale.double().square())
    constant = variances.log().sum(1) + (m * m * precision).sum(1)
    bias = log_weights - 0.5 * (constant + means.shape[1] * math.log(2.0 * math.pi))
    weight = torch.cat((m * precision, -0.5 * precision), dim=1).T.contiguous()
    return Quadratic(centre, inverse_scale, weight.to(dtype), bias.to(dtype))


def log_likelihood_of(joint: Tensor, posterior: Tensor) -> Tensor:
    """logsumexp over k of log p(x, k) (n, K), given its softmax over k: (n,).

    The largest posterior is exp(best - logsumexp). `torch.logsumexp` and `exp` take ten times as
    long where exponentials underflow, as nearly all do here, while softmax does not: 2.4 against
    26 ms for 2^20 float64 values spread over 3,000 nats.
    """
    return joint.amax(1) - posterior.amax(1).log()


def log_joint_of(frames: Tensor, mixture: Mixture, components: Tensor) -> Tensor:
    """log p(x, k) of one component a frame, as (x - m)^2 / v: frames (n, D), (n,) int64 -> (n,).

    Nothing cancels: float32 is right to a few units of its own.
    """
    log_weights, means, variances = (p[components] for p in mixture)
    square = (frames.to(means.dtype) - means).square() / variances
    return log_weights - 0.5 * (square + (2.0 * math.pi * variances).log()).sum(1)


def row_chunks(n_rows: int, width: int, *, values: int | None = None) -> Iterator[slice]:
    """Slices of at most ``values // width`` rows (`CHUNK_VALUES`) that cover `n_rows`, in order."""
    step = max(1, (values or CHUNK_VALUES) // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def check_ensemble(frames: Tensor, ensemble: Ensemble) -> None:
    """Refuse an ensemble that has no mean; each mixture as in `check_frames`.

    Raises:
        InputError: no mixture, unequal K, or shares that are no weights of a mean.
        TypeError: `frames` is not a floating-point tensor.
    """
    mixtures, shares = ensemble
    if not mixtures or len(shares) != len(mixtures):
        raise InputError(
            f"ensemble: expected a share for each of its mixtures, got {len(shares)} shares "
            f"for {len(mixtures)} mixtures"
        )
    if not (all(0.0 <= share < math.inf for share in shares) and sum(shares) > 0.0):
        raise InputError(f"shares: expected numbers from 0, not all 0, got {tuple(shares)}")
    for i, mixture in enumerate(mixtures):
        check_frames(frames, mixture)
        if mixture.means.shape != mixtures[0].means.shape:
            raise InputError(
                f"ensemble: expected {mixtures[0].means.shape[0]} components as in the first "
                f"mixture, got {mixture.means.shape[0]} in mixture {i}"
            )


def check_frames(frames: Tensor, mixture: Mixture) -> None:
    """Refuse what no kernel could read; shapes, types and devices only, never values.

    Raises:
        TypeError: `frames` is not a floating-point tensor, or `mixture` no `Mixture` of tensors.
        InputError: shapes or devices disagree, or a mixture parameter requires a gradient.
    """
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        raise TypeError(f"frames: expected a floating-point tensor, got {kind_of(frames)}")
    of_three = isinstance(mixture, tuple) and len(mixture) == 3
    if not of_three or not all(isinstance(p, Tensor) for p in mixture):
        parts = f" of {kind_of(mixture[1])}" if of_three else ""
        raise TypeError(f"mixture: expected a Mixture of tensors, got {kind_of(mixture)}{parts}")
    log_weights, means, variances = mixture
    if means.ndim != 2 or variances.shape != means.shape or log_weights.shape != means.shape[:1]:
        raise InputError(
            "mixture: expected log_weights (K,), means (K, D), variances (K, D), got "
            f"{tuple(log_weights.shape)}, {tuple(means.shape)}, {tuple(variances.shape)}"
        )
    if frames.ndim < 1 or frames.shape[-1] != means.shape[1]:
        raise InputError(
            f"frames: expected (..., {means.shape[1]}) for this mixture, got {tuple(frames.shape)}"
        )
    for parameter in mixture:
        if frames.device != parameter.device:
            raise InputError(
                f"frames: on {frames.device}, but the mixture is on {parameter.device}"
            )
    if any(parameter.requires_grad for parameter in mixture):
        raise InputError("mixture: expected frozen parameters, got one that requires a gradient")
