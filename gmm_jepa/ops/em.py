"""Sufficient statistics of one iteration of EM or of k-means, and assignment to centroids.

    r_nk = posterior of component k for frame n
    counts_k = sum_n r_nk,  first_k = sum_n r_nk x_n,  second_k = sum_n r_nk x_n^2

Responsibilities live one chunk at a time and never as a whole. On the CPU alone they are added up
by index: elsewhere that would be in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import kind_of
from gmm_jepa.ops.mixture import (
    CHUNK_VALUES,
    Mixture,
    check_frames,
    log_likelihood_of,
    quadratic,
    row_chunks,
)
from gmm_jepa.ops.operator import Operator, without_autocast
from gmm_jepa.ops.screen import Screen

# The gathered pairs of a chunk should stay in cache: at K = 256, 1,024 rows gave 179 k frames/s on
# one core of two, 4,096 rows 125 k.
CHUNK_ROWS = 1024
# Frames that are in float64 at a time where they are added up by centroid.
BLOCK_ROWS = 8192


class EMStatistics(NamedTuple):
    """What the M-step needs: sums over frames, so two halves of the data add up to the whole."""

    counts: Tensor
    """(K,) float64, sum of responsibilities"""
    first: Tensor
    """(K, D) float64, responsibilities' x frames"""
    second: Tensor
    """(K, D) float64, responsibilities' x frames squared"""
    log_likelihood: Tensor
    """() float64, sum of log p(x) over the frames"""


def em_statistics(frames: Tensor, mixture: Mixture) -> EMStatistics:
    """Expected sufficient statistics of the frames under a mixture, in float64.

    The sums are taken on standardised frames and mapped back, so large offsets cost no digits
    beyond those of ``second`` itself. No gradient.

    Args:
        frames: (N, D), any float type; N may be 0.
        mixture: the mixture of K components.

    Raises:
        InputError: shapes or devices disagree.
        TypeError: `frames` is not a floating-point tensor.
    """
    check_frames(frames, mixture)
    if frames.ndim != 2:
        raise InputError(f"frames: expected (N, D), got {tuple(frames.shape)}")
    return EMStatistics(*_em_statistics(frames.detach(), *mixture))


def kmeans_assign(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every frame; the first one wins a tie. No gradient.

    Args:
        frames: (N, D), any float type; N may be 0.
        centroids: (K, D) on the same device.

    Returns:
        labels (N,) int64 and squared Euclidean distances (N,) float32.

    Raises:
        InputError: shapes or devices disagree.
        TypeError: `frames` is not a floating-point tensor.
    """
    _check_centroids(frames, centroids)
    return _kmeans_assign(frames.detach(), centroids.detach())


def _check_centroids(frames: Tensor, centroids: Tensor) -> None:
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        raise TypeError(f"frames: expected a floating-point tensor, got {kind_of(frames)}")
    if frames.ndim != 2 or centroids.ndim != 2 or frames.shape[1] != centroids.shape[1]:
        raise InputError(
            "frames, centroids: expected (N, D) and (K, D), got "
            f"{tuple(frames.shape)} and {tuple(centroids.shape)}"
        )
    if frames.device != centroids.device:
        raise InputError(f"frames: on {frames.device}, but centroids on {centroids.device}")


def kmeans_statistics(frames: Tensor, centroids: Tensor) -> EMStatistics:
    """Statistics with all of a frame's responsibility on its nearest centroid, in float64.

    The log-likelihood's place is taken by minus the sum of squared distances. No gradient.

    Args:
        frames: (N, D), any float type; N may be 0.
        centroids: (K, D) on the same device.

    Raises:
        InputError: shapes or devices disagree.
        TypeError: `frames` is not a floating-point tensor.
    """
    _check_centroids(frames, centroids)
    return EMStatistics(*_kmeans_statistics(frames.detach(), centroids.detach()))


def em_statistics_reference(
    frames: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `em_statistics`, in plain torch."""
    K, D = means.shape
    mixture = Mixture(log_weights, means, variances)
    form = quadratic(mixture, torch.float64)
    screen = Screen(mixture, form) if frames.device.type == "cpu" else None
    counts = form.bias.new_zeros(K)
    moments = form.bias.new_zeros(K, 2 * D)
    log_likelihood = form.bias.new_zeros(())
    for rows in row_chunks(frames.shape[0], max(K, CHUNK_VALUES // CHUNK_ROWS)):
        features = form.features(frames[rows])
        found = screen.candidates(features) if screen is not None else None
        if found is None:
            joint = torch.addmm(form.bias, features, form.weight)
            responsibilities = torch.softmax(joint, dim=1)
            log_likelihood += log_likelihood_of(joint, responsibilities).sum()
            counts += responsibilities.sum(0)
            moments.addmm_(responsibilities.T, features)
        else:
            responsibilities = found.responsibilities()
            log_likelihood += found.log_likelihoods().sum()
            counts.index_add_(0, found.components, responsibilities)
            weighted = features.index_select(0, found.rows).mul_(responsibilities[:, None])
            moments.index_add_(0, found.components, weighted)
    # x = centre + scale z: map the moments of z back to those of x
    n = counts[:, None]
    z1, z2 = moments[:, :D] / form.inverse_scale, moments[:, D:] / form.inverse_scale**2
    first = n * form.centre + z1
    second = n * form.centre**2 + 2.0 * form.centre * z1 + z2
    return counts, first, second, log_likelihood


_em_statistics = Operator("gmm_jepa::em_statistics", em_statistics_reference)


@_em_statistics.register_fake
def _(frames, log_weights, means, variances):
    K, D = means.shape
    return tuple(
        means.new_empty(shape, dtype=torch.float64) for shape in ((K,), (K, D), (K, D), ())
    )


def kmeans_assign_reference(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """`kmeans_assign` in plain torch."""
    # Float64 and one common shift, so that no pair of centroids is confused by rounding.
    shift = centroids.double().mean(0)
    c = centroids.double() - shift
    bias = -0.5 * c.square().sum(1)
    labels = frames.new_empty(frames.shape[:1], dtype=torch.int64)
    distances = frames.new_empty(frames.shape[:1], dtype=torch.float32)
    for rows in row_chunks(frames.shape[0], c.shape[0]):
        x = frames[rows] - shift
        labels[rows] = torch.addmm(bias, x, c.T).argmax(1)  # largest x.c - c^2/2 is nearest
        distances[rows] = (x - c[labels[rows]]).square().sum(1).float()
    return labels, distances


_kmeans_assign = Operator("gmm_jepa::kmeans_assign", kmeans_assign_reference)


@_kmeans_assign.register_fake
def _(frames, centroids):
    shape = frames.shape[:1]
    return frames.new_empty(shape, dtype=torch.int64), frames.new_empty(shape, dtype=torch.float32)


def kmeans_statistics_reference(
    frames: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `kmeans_statistics`, by `kmeans_assign`."""
    first = centroids.new_zeros(centroids.shape, dtype=torch.float64)
    counts, second, inertia = first.new_zeros(len(first)), first.clone(), first.new_zeros(())
    for part in frames.split(BLOCK_ROWS):
        labels, distances = _kmeans_assign(part, centroids)
        x = part.double()
        if x.device.type == "cpu":
            counts += torch.bincount(labels, minlength=len(counts))
            first.index_add_(0, labels, x)
            second.index_add_(0, labels, x.square())
        else:
            responsibilities = F.one_hot(labels, len(counts)).double()
            counts += responsibilities.sum(0)
            first.addmm_(responsibilities.T, x)
            second.addmm_(responsibilities.T, x.square())
        inertia -= distances.sum(dtype=torch.float64)
    return counts, first, second, inertia


_kmeans_statistics = Operator("gmm_jepa::kmeans_statistics", kmeans_statistics_reference)


@_kmeans_statistics.register_fake
def _(frames, centroids):
    K, D = centroids.shape
    return tuple(
        frames.new_empty(shape, dtype=torch.float64) for shape in ((K,), (K, D), (K, D), ())
    )


without_autocast(_em_statistics, _kmeans_assign, _kmeans_statistics)
