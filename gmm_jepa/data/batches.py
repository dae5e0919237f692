"""Which utterances make up which batch: a pure function of (seed, epoch, step).

Nothing is stored per epoch and no list of batches is ever made: a step is sent through a
counter-based permutation to a batch of some bucket, and the rows of that batch through another
to utterances. Starting at step 10,000,000 costs what starting at 0 costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gmm_jepa.data.buckets import QUANTUM_SAMPLES, optimal_edges, segment_bounds, split_rows
from gmm_jepa.data.permute import permute, permute_one, uniform
from gmm_jepa.errors import InputError

EMPTY = -1
_ROUNDING = 1e-9
"""Relative error that sums of weights may have."""


@dataclass(frozen=True)
class BatchRows:
    """The global batch of one step; the same for any number of ranks.

    Attributes:
        step: over all epochs.
        epoch: from 0.
        utterance: (R,) int64; -1 in an empty row.
        start_samples: (R,) int64, where in its utterance a row begins.
        n_samples: (R,) int64; 0 in an empty row.
        padded_samples: the length of all rows.
    """

    step: int
    epoch: int
    utterance: np.ndarray
    start_samples: np.ndarray
    n_samples: np.ndarray
    padded_samples: int


def rank_rows(n_rows: int, rank: int, world_size: int) -> np.ndarray:
    """Rows of the global batch that a rank takes: every `world_size`-th, as many on every rank.

    Returns:
        int64; numbers from `n_rows` on stand for empty rows.
    """
    return np.arange(rank, -(-n_rows // world_size) * world_size, world_size)


class BatchPlan:
    """All batches of a run.

    Utterances longer than `max_samples` are cut into equal consecutive segments; every segment
    occurs exactly once per epoch where its weight is 1. With weight w it occurs floor(w) times,
    and once more in a share w - floor(w) of the epochs; but where a batch has one row and that
    would stay empty, it has one of the bucket's segments, drawn by weight. Segments of similar
    length share batches, whose shapes are few and fixed (`shapes`); the number of batches is the
    same in every epoch.

    Args:
        durations_samples: (N,) lengths of the utterances.
        weights: (N,) occurrences per epoch; None: 1.
        seed: of the order.
        batch_samples: padded samples per global batch, at most (but never less than a row).
        max_samples: the longest segment.
        min_samples: shorter utterances are left out; at most half of `max_samples`.
        n_buckets: the most lengths to pad to; as many are used as bring padding, empty rows
            included, under `target_padding`.
        target_padding: see `n_buckets`. Fewer lengths make fewer, fuller batches of a corpus that
            has only a few batches in all: see `fill`.

    Raises:
        InputError: an argument is out of its range, or no utterance is left.
    """

    def __init__(
        self,
        durations_samples: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        seed: int = 0,
        batch_samples: int,
        max_samples: int,
        min_samples: int = 1,
        n_buckets: int = 32,
        target_padding: float = 0.04,
    ):
        durations = np.asarray(durations_samples, np.int64)
        weights = np.ones(len(durations)) if weights is None else np.asarray(weights, np.float64)
        _check_weights(durations, weights)
        _check_sizes(batch_samples, max_samples, min_samples, n_buckets)
        self.seed = int(seed)
        utterance, start, n_samples, self.n_too_short = segment_bounds(
            durations, max_samples, min_samples
        )
        weight = weights[utterance]
        used = weight > 0
        if not used.any():
            raise InputError(
                f"no utterance to train on: {len(durations)} given, {self.n_too_short} shorter "
                f"than min_samples = {min_samples}, the others of weight 0"
            )
        if weight.sum() < 1 - _ROUNDING:
            raise InputError("weights are so small that an epoch has less than one utterance")
        self._real_samples = float(n_samples @ weight)
        padded = -(-n_samples // QUANTUM_SAMPLES) * QUANTUM_SAMPLES
        lengths, inverse = np.unique(padded[used], return_inverse=True)
        counts = np.bincount(inverse, weights=weight[used])
        options = optimal_edges(lengths, counts, n_buckets, batch_samples)
        edges = _fewest(options, self._real_samples / (1 - target_padding))
        self._edges = _without_rare(edges, lengths, counts)
        bucket = np.searchsorted(self._edges, padded).astype(np.int16)
        order = np.flatnonzero(used)[np.argsort(bucket[used], kind="stable")]
        self._utterance = _compact(utterance[order])
        self._start = _compact(start[order])
        self._n_samples = _compact(n_samples[order])
        self._fill_slots(weight[order], np.bincount(bucket[used], minlength=len(self._edges)))
        self._n_bucket_batches, self._rows = split_rows(self._n_slots, self._edges, batch_samples)
        self._batch_ends = np.cumsum(self._n_bucket_batches)

    def n_batches(self) -> int:
        """Batches per epoch, the same in every one."""
        return int(self._batch_ends[-1])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes that global batches have: (rows, padded samples)."""
        return [
            (int(rows), int(edge))
            for rows, edge, n in zip(self._rows, self._edges, self._n_bucket_batches)
            if n > 0
        ]

    def padding(self, world_size: int = 1) -> float:
        """The share of what so many ranks compute that is padding, empty rows included."""
        rows = -(-self._rows // world_size) * world_size
        held = float((self._n_bucket_batches * rows * self._edges).sum())
        return 1.0 - self._real_samples / held

    def batch(self, step: int) -> BatchRows:
        """The global batch of a step; steps run on over the epochs."""
        if step < 0:
            raise IndexError(f"steps begin at 0, got {step}")
        n_batches = self.n_batches()
        epoch, within = divmod(int(step), n_batches)
        number = permute_one(within, n_batches, self.seed, epoch, "batches")
        bucket = int(np.searchsorted(self._batch_ends, number, side="right"))
        n_here, n_slots = int(self._n_bucket_batches[bucket]), int(self._n_slots[bucket])
        j = number - (int(self._batch_ends[bucket]) - n_here)
        positions = np.arange(j * n_slots // n_here, (j + 1) * n_slots // n_here)
        slots = permute(positions, n_slots, self.seed, epoch, "rows", bucket)
        segments = self._segments(bucket, slots, epoch)
        rows = int(self._rows[bucket])

        def column(values: np.ndarray, fill: int) -> np.ndarray:
            filled = np.full(rows, fill, np.int64)
            filled[: len(segments)] = values[segments]
            return filled

        return BatchRows(
            step=int(step),
            epoch=epoch,
            utterance=column(self._utterance, EMPTY),
            start_samples=column(self._start, 0),
            n_samples=column(self._n_samples, 0),
            padded_samples=int(self._edges[bucket]),
        )

    def _fill_slots(self, weight: np.ndarray, sizes: np.ndarray) -> None:
        """Count a bucket's rows per epoch: whole occurrences first, then the drawn ones.

        Of these, as many as the sum of the shares rounded up, the last may stay empty.

        Args:
            weight: (M,) of the segments, in the order of the buckets.
            sizes: (B,) segments per bucket.
        """
        self._first = np.cumsum(sizes) - sizes
        self._n_whole, self._n_drawn = sizes.copy(), np.zeros_like(sizes)
        self._repeats = self._shares = None
        if (weight == 1).all():
            self._n_slots = self._n_whole
            return
        whole = np.floor(weight).astype(np.int64)
        self._repeats = np.concatenate([[0], np.cumsum(whole)])
        self._shares = np.concatenate([[0.0], np.cumsum(weight - whole)])
        last = self._first + sizes
        self._n_whole = self._repeats[last] - self._repeats[self._first]
        total = self._shares[last] - self._shares[self._first]
        self._n_drawn = np.ceil(total * (1 - _ROUNDING)).astype(np.int64)
        self._n_slots = self._n_whole + self._n_drawn

    def _segments(self, bucket: int, slots: np.ndarray, epoch: int) -> np.ndarray:
        """Which segments are in these rows of a bucket in an epoch; fewer where one stays empty."""
        first, n_whole = int(self._first[bucket]), int(self._n_whole[bucket])
        if self._repeats is None:
            return first + slots
        segments = np.searchsorted(self._repeats, self._repeats[first] + slots, side="right") - 1
        drawn = slots >= n_whole
        if not drawn.any():
            return segments
        # Systematic sampling: points one apart on the line of summed shares, up to its end.
        end = first + self._size(bucket)
        point = slots[drawn] - n_whole + uniform(self.seed, epoch, "drawn", bucket)
        point += self._shares[first]
        segments[drawn] = np.searchsorted(self._shares, point, side="right") - 1
        there = segments < end
        if not there.any():  # the one row of a batch: a batch of nothing is no step
            here = slice(first, end + 1)
            line = self._repeats[here] + self._shares[here]  # of weights
            point = uniform(self.seed, epoch, "instead", bucket) * (line[-1] - line[0])
            return first + np.searchsorted(line, [line[0] + point], side="right") - 1
        return segments[there]

    def _size(self, bucket: int) -> int:
        ends = (*self._first[1:], len(self._utterance))
        return int(ends[bucket] - self._first[bucket])


def _compact(values: np.ndarray) -> np.ndarray:
    """The same as int32 where that holds them."""
    return values.astype(np.int32) if values.max() < 1 << 31 else values


def _without_rare(edges: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Edges without those of buckets that would get less than one segment an epoch.

    Args:
        edges: (B,) ascending.
        lengths: (L,) padded lengths that occur.
        counts: (L,) how often in an epoch, together 1 or more.
    """
    kept: list[int] = []
    waiting = 0.0
    for edge, count in zip(edges, np.bincount(np.searchsorted(edges, lengths), counts)):
        waiting += count
        if waiting >= 1 - _ROUNDING:
            kept.append(edge)
            waiting = 0.0
    kept[-1] = edges[-1]
    return np.array(kept)


def _fewest(options: list[tuple[np.ndarray, int]], allowed: float) -> np.ndarray:
    """The fewest edges whose batches hold no more samples than allowed, else the best there are."""
    for edges, held in options:
        if held <= allowed:
            return edges
    return min(options, key=lambda option: option[1])[0]


def _check_weights(durations: np.ndarray, weights: np.ndarray) -> None:
    if weights.shape != durations.shape or durations.ndim != 1:
        raise InputError(
            f"weights: one per utterance is needed {durations.shape}, got {weights.shape}"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError("weights: 0 or more is needed, got a negative one, NaN or infinity")


def _check_sizes(batch_samples: int, max_samples: int, min_samples: int, n_buckets: int) -> None:
    for name, value in (("batch_samples", batch_samples), ("n_buckets", n_buckets)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    if not 1 <= min_samples <= max_samples / 2:
        raise InputError(
            f"min_samples must be in 1..max_samples/2 (halves of an utterance just too long are "
            f"kept), got {min_samples} with max_samples = {max_samples}"
        )
