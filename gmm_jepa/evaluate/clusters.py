"""Measures of cluster tracks: one cluster per frame, utterances laid end to end.

A track is ``labels`` (N,) int64 with ``offsets`` (U + 1,) int64: utterance u owns the frames
``offsets[u]:offsets[u + 1]``. Pairs of frames never straddle two utterances.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gmm_jepa.objectives.meters import usage_entropy


def usage(counts: NDArray[np.int64]) -> dict[str, float]:
    """How evenly K clusters are used.

    Args:
        counts: (K,) frames per cluster.

    Returns:
        ``entropy`` in [0, 1] (divided by log K), ``used`` clusters with a frame, ``effective``
        clusters (exp of the entropy in nats), ``top_share`` of the commonest cluster.
    """
    entropy = float(usage_entropy(torch.from_numpy(counts)))
    total = int(counts.sum())
    return {
        "entropy": entropy,
        "used": int((counts > 0).sum()),
        "effective": float(len(counts) ** entropy) if total else 0.0,
        "top_share": float(counts.max() / total) if total else 0.0,
    }


def adjacent_pairs(
    labels: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The clusters of all (frame, next frame) pairs inside utterances, as two (P,) arrays."""
    inside = np.ones(max(len(labels) - 1, 0), dtype=bool)
    cuts = offsets[1:-1] - 1
    inside[cuts[(cuts >= 0) & (cuts < len(inside))]] = False
    return labels[:-1][inside], labels[1:][inside]


def adjacent_consistency(labels: NDArray[np.int64], offsets: NDArray[np.int64]) -> float:
    """Share of adjacent frame pairs that carry the same cluster; NaN without pairs."""
    left, right = adjacent_pairs(labels, offsets)
    return float((left == right).mean()) if len(left) else float("nan")


def _count_pairs(
    left: NDArray[np.int64], right: NDArray[np.int64], n_clusters: int
) -> NDArray[np.int64]:
    counts = np.bincount(left * n_clusters + right, minlength=n_clusters**2)
    return counts.reshape(n_clusters, n_clusters)


def top_transitions(
    labels: NDArray[np.int64], offsets: NDArray[np.int64], *, n_clusters: int, top: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Transition probabilities among the commonest clusters, neighbours placed side by side.

    Returns:
        clusters: (M,) the `top` commonest clusters that occur (ties: the lower index), ordered so
            that clusters which follow one another lie close (by the Fiedler vector of the graph of
            transitions: a path through the heatmap instead of scattered dots).
        probabilities: (M, M) P(next = column | now = row); a row sums to 1 at most, the rest goes
            to clusters that are not shown.
    """
    counts = np.bincount(labels, minlength=n_clusters)
    order = np.argsort(-counts, kind="stable")[:top]
    clusters = order[counts[order] > 0]
    place = np.full(n_clusters, -1)
    place[clusters] = np.arange(len(clusters))
    left, right = adjacent_pairs(labels, offsets)
    leaving = np.bincount(left, minlength=n_clusters)[clusters]
    shown = (place[left] >= 0) & (place[right] >= 0)
    table = _count_pairs(place[left[shown]], place[right[shown]], len(clusters))
    path = _seriation(table + table.T)
    table, leaving, clusters = table[np.ix_(path, path)], leaving[path], clusters[path]
    return clusters, table / np.maximum(leaving, 1)[:, None]


def _seriation(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order of the nodes along the Fiedler vector of a symmetric (M, M) weight matrix."""
    if len(weights) < 3:
        return np.arange(len(weights))
    graph = weights - np.diag(np.diag(weights)) + 1e-3  # a little of everything keeps it connected
    scale = 1 / np.sqrt(graph.sum(1))
    laplacian = np.eye(len(graph)) - scale[:, None] * graph * scale[None, :]
    fiedler = np.linalg.eigh(laplacian)[1][:, 1] * scale
    # The sign of an eigenvector is arbitrary: the commonest cluster comes in the first half.
    if fiedler[0] > np.median(fiedler):
        fiedler = -fiedler
    return np.argsort(fiedler, kind="stable")
