"""Lengths into a few padded lengths, so that little is padding."""

from __future__ import annotations

import numpy as np

QUANTUM_SAMPLES = 320  # one encoder frame: padded lengths are multiples of it

_MAX_LENGTHS = 1_536  # longer tables of distinct lengths are thinned; the search is quadratic


def segment_bounds(
    durations_samples: np.ndarray, max_samples: int, min_samples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut what is longer than `max_samples` into equal consecutive parts.

    Args:
        durations_samples: (N,) int64.
        max_samples: the longest part, in samples.
        min_samples: what is shorter is left out.

    Returns:
        utterance, start_samples and n_samples, each (M,) int64, in the order of the utterances;
        and how many utterances were left out.
    """
    durations = np.asarray(durations_samples, np.int64)
    kept = np.flatnonzero(durations >= min_samples)
    n_parts = -(-durations[kept] // max_samples)
    utterance = np.repeat(kept, n_parts)
    parts = np.repeat(n_parts, n_parts)
    ordinal = np.arange(len(utterance)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    total = durations[utterance]
    start = total * ordinal // parts
    n_samples = total * (ordinal + 1) // parts - start
    return utterance, start, n_samples, len(durations) - len(kept)


def split_rows(
    n_rows: np.ndarray, edges: np.ndarray, batch_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batches per bucket and rows per batch: as many rows as fit, spread so that few are empty.

    Args:
        n_rows: (B,) rows to place, whole numbers.
        edges: (B,) or () samples each is padded to.
        batch_samples: samples that a batch may have (one row it always may).

    Returns:
        n_batches and rows, each (B,) int64; 0 where there is nothing to place.
    """
    n_batches = -(-n_rows // np.maximum(1, batch_samples // edges))
    rows = -(-n_rows // np.maximum(1, n_batches))
    return n_batches.astype(np.int64), rows.astype(np.int64)


def optimal_edges(
    lengths: np.ndarray,
    counts: np.ndarray,
    max_buckets: int,
    batch_samples: int,
) -> list[tuple[np.ndarray, int]]:
    """Bucket edges that pad least, for every number of buckets up to `max_buckets`.

    Dynamic programming over the distinct lengths: with b buckets, the last one holds lengths
    (j, i] padded to length i, and the rest is the best for j with b - 1 buckets. The cost is all
    samples in the batches, empty rows included.

    Args:
        lengths: (L,) distinct lengths, ascending.
        counts: (L,) how many (fractions allowed) have each.
        max_buckets: the most buckets.
        batch_samples: samples that a batch may have, see `split_rows`.

    Returns:
        For b = 1, 2, ...: edges (b,) ascending, the last the longest length; and the samples in
        all batches.
    """
    lengths, counts = _thinned(np.asarray(lengths, np.int64), np.asarray(counts, np.float64))
    size = len(lengths)
    below = np.concatenate([[0.0], np.cumsum(counts)])  # how many lie below each length
    cost = np.full((size + 1, size + 1), np.inf)  # [j, i]: one bucket of lengths j..i-1
    for i in range(1, size + 1):
        edge = lengths[i - 1]
        n_rows = np.ceil(below[i] - below[:i])
        n_batches, rows = split_rows(n_rows, edge, batch_samples)
        cost[:i, i] = n_batches * rows * edge
    best = cost[0]  # [i]: the first i lengths in b buckets, none of them empty
    cuts: list[np.ndarray] = []
    answers = []
    for b in range(1, min(max_buckets, size) + 1):
        if b > 1:
            through = best[:, None] + cost
            cuts.append(through.argmin(axis=0))
            best = through.min(axis=0)
        edges, i = [int(lengths[size - 1])], size
        for cut in reversed(cuts):
            i = int(cut[i])
            edges.append(int(lengths[i - 1]))
        answers.append((np.array(edges[::-1], np.int64), int(best[size])))
    return answers


def _thinned(lengths: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_LENGTHS` lengths: neighbours merge, each into the longer."""
    step = -(-len(lengths) // _MAX_LENGTHS)
    if step == 1:
        return lengths, counts
    last = np.arange(len(lengths) - 1, -1, -step)[::-1]
    first = np.concatenate([[0], last[:-1] + 1])
    return lengths[last], np.add.reduceat(counts, first)
