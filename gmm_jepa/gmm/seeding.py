"""Where EM starts: a uniform sample of the stream, k-means++ on it, a few Lloyd steps.

k-means++: Arthur and Vassilvitskii 2007, with several candidates a step as in scikit-learn.
Everything here runs on the CPU from one seed: the same start whatever device the frames live on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.gmm.em import maximisation
from gmm_jepa.gmm.stream import Frames, as_frames
from gmm_jepa.ops import Mixture, kmeans_statistics

LLOYD_STEPS = 5
# Frames a component among which the first centroids are chosen: choosing costs a pass over all
# of them for every component, and Lloyd steps and EM move the centroids anyway.
CHOICE_FRAMES = 16


def generators(random_state: int | None) -> Iterator[np.random.Generator]:
    """One for the sample, one for the choice among it: so processes with unlike many frames, which
    draw unlike often for the sample, choose alike."""
    if not (random_state is None or (isinstance(random_state, Integral) and random_state >= 0)):
        raise InputError(
            f"random_state: expected a whole number from 0 or None, got {random_state!r}; the "
            "estimators of gmm_jepa.sklearn take generators, too"
        )
    return map(np.random.default_rng, np.random.SeedSequence(random_state).spawn(2))


def sample_stream(batches: Iterable[Tensor], n_frames: int, random: np.random.Generator) -> Tensor:
    """Uniform sample without replacement of at most `n_frames` frames, in stream order.

    Every frame draws a priority and the lowest stay, so the sample does not depend on how the
    stream is cut into batches. Memory: ``2 n_frames`` rows and a batch.

    Returns:
        (n, D) on the CPU, in the dtype of the stream.

    Raises:
        InputError: the stream is empty.
    """
    rows: list[Tensor] = []
    priorities = np.empty(0)
    limit = np.inf
    for frames in batches:
        drawn = random.random(frames.shape[0])
        chosen = np.flatnonzero(drawn < limit)
        rows.append(frames[torch.from_numpy(chosen).to(frames.device)].cpu())
        priorities = np.concatenate((priorities, drawn[chosen]))
        if priorities.size > 2 * n_frames:
            rows, priorities = _lowest(rows, priorities, n_frames)
            limit = priorities.max()
    if not priorities.size:
        raise InputError(
            "X: Found array with 0 sample(s), no frames while a minimum of 1 is required."
        )
    rows, _ = _lowest(rows, priorities, n_frames)
    return rows[0]


def start_sample(
    stream: Iterable[Tensor],
    n_frames: int,
    random: np.random.Generator,
    start_frames: Frames | None,
) -> Tensor:
    """Frames (n, D) on the CPU that a fit starts from: those given, or a sample of the stream."""
    if start_frames is not None:
        return as_frames(start_frames).cpu()
    return sample_stream(stream, n_frames, random)


def _lowest(
    rows: list[Tensor], priorities: np.ndarray, n_frames: int
) -> tuple[list[Tensor], np.ndarray]:
    index = np.sort(np.argsort(priorities, kind="stable")[:n_frames])
    ends = np.cumsum([len(part) for part in rows])
    cuts = np.searchsorted(index, ends)
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in rows))
    kept = rows[0].new_empty(len(index), rows[0].shape[1], dtype=dtype)
    begin = 0
    for part, end, cut in zip(rows, ends, cuts):  # without a copy of all rows
        wanted = torch.from_numpy(index[begin:cut] - (end - len(part)))
        kept[begin:cut] = part.index_select(0, wanted)
        begin = cut
    return [kept], priorities[index]


def start_from(
    sample: Tensor,
    n_components: int,
    variance_floor: float,
    random: np.random.Generator,
    centroids: Tensor | None = None,
) -> Mixture:
    """Mixture of the k-means clusters of a sample.

    Args:
        sample: (n, D) frames on the CPU, n >= n_components.
        n_components: K.
        variance_floor: no variance starts below it.
        random: draws the first centroids.
        centroids: (K, D) float64 to group the sample by, instead of k-means.

    Returns:
        float64, on the CPU. A cluster without frames keeps its centroid and the variance of the
        whole sample.
    """
    if centroids is None:
        centroids = first_centroids(sample, n_components, random)
        for _ in range(LLOYD_STEPS):
            groups = kmeans_statistics(sample, centroids)
            n = groups.counts[:, None]
            centroids = torch.where(n > 0, groups.first / n.clamp_min(1.0), centroids)
    columns = sample.split(8, dim=1)  # a few in float64 at a time
    spread = torch.cat([part.double().var(0, correction=0) for part in columns])
    spread = spread.expand_as(centroids)
    blank = Mixture(centroids.new_zeros(n_components, dtype=torch.float64), centroids, spread)
    return maximisation(kmeans_statistics(sample, centroids), blank, variance_floor)


def first_centroids(sample: Tensor, n_centroids: int, random: np.random.Generator) -> Tensor:
    """k-means++ on as much of the sample (n, D) as is worth it: (K, D) float64."""
    n_choice = min(sample.shape[0], CHOICE_FRAMES * n_centroids)
    choice = np.sort(random.choice(sample.shape[0], n_choice, replace=False))
    return kmeans_plus_plus(sample[torch.from_numpy(choice)], n_centroids, random)


def kmeans_plus_plus(frames: Tensor, n_centroids: int, random: np.random.Generator) -> Tensor:
    """First centroids (K, D) float64: frames drawn far from those drawn before.

    Of ``2 + ln K`` candidates a step, drawn in proportion to their squared distance from the
    nearest centroid, the one that lowers the sum of these distances the most is taken. With fewer
    distinct frames than centroids some centroids coincide.
    """
    x = (frames.double() - frames.double().mean(0)).float()
    squares = x.square().sum(1)
    n_candidates = 2 + int(math.log(n_centroids))
    chosen = [int(random.integers(x.shape[0]))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    for _ in range(1, n_centroids):
        cumulative = nearest.double().cumsum(0)
        total = float(cumulative[-1])
        if total > 0.0:
            draws = torch.from_numpy(random.random(n_candidates) * total)
            candidates = torch.searchsorted(cumulative, draws).clamp_max(x.shape[0] - 1)
        else:
            candidates = torch.from_numpy(random.integers(x.shape[0], size=1))
        distances = torch.addmm(squares, x[candidates], x.T, alpha=-2.0)
        distances += squares[candidates, None]
        closer = torch.minimum(distances.clamp_min_(0.0), nearest)
        best = int(closer.sum(1, dtype=torch.float64).argmin())
        nearest = closer[best]
        nearest[candidates[best]] = 0.0
        chosen.append(int(candidates[best]))
    return frames[chosen].double()
