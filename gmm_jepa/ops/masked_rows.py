"""Walking over the weighted rows of a batch in plain torch, a chunk that fits the cache at a time.

The masked losses read every weighted row once and write every row of the gradient once. On a CPU
the weighted rows of a chunk are gathered, so the others cost nothing; elsewhere, where a count
would make the host wait, all rows are computed and those of weight 0 are blanked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gmm_jepa.ops.mixture import CHUNK_VALUES, row_chunks

# Values of the (rows, K) chunk a CPU thread works on: 128 rows of 1,024, the weighted half of them
# 256 KB, stay in the L2 cache of one core through all the passes of a loss.
CACHED_VALUES = 1 << 17
# Elsewhere launches cost more than memory: 64 MB in float32.
CHUNK_VALUES_ELSEWHERE = 16 * CHUNK_VALUES


class Rows:
    """The weighted rows of one chunk of a batch."""

    def __init__(self, row_weights: Tensor, chunk: slice) -> None:
        self.chunk = chunk
        self.weights = row_weights[chunk].float()
        weighted = self.weights != 0
        self._blank = self._index = self._position = None
        if not self.gathers(row_weights):
            self._blank = ~weighted
            return
        index = weighted.nonzero().squeeze(1)
        if len(index) < len(weighted):
            self._index, self.weights = index, self.weights[index]
            self._position = torch.where(weighted, weighted.cumsum(0) - 1, len(index))

    @staticmethod
    def gathers(row_weights: Tensor) -> bool:
        """Whether rows can be counted without waiting for a device."""
        return row_weights.device.type == "cpu"

    def of(self, tensor: Tensor) -> Tensor:
        """Rows (n, ...) of a tensor (N, ...); may be a view of it."""
        part = tensor[self.chunk]
        if self._blank is not None:
            return part.masked_fill(self._blank.view(-1, *[1] * (part.ndim - 1)), 0)
        return part if self._index is None else part.index_select(0, self._index)

    def place(self, values: Tensor, out: Tensor) -> None:
        """Write `values` (n, K) times the rows' weights into their rows of `out` (N, K), 0 beside.

        Every row of the chunk is written once.
        """
        part, weights = out[self.chunk], self.weights[:, None]
        if self._position is None:
            torch.mul(values, weights, out=part)
            return
        n, K = values.shape
        spread = out.new_empty((n + 1, K))
        torch.mul(values, weights, out=spread[:n])
        spread[n] = 0
        torch.index_select(spread, 0, self._position, out=part)


class MaskedSums:
    """What a masked loss gathers while it walks over a batch.

    Args:
        rows: (N, K), what the gradient is made for.
        row_weights: (N,).
        with_gradient: whether `gradient` (like `rows`) is wanted; every row of it gets written.
    """

    def __init__(self, rows: Tensor, row_weights: Tensor, with_gradient: bool) -> None:
        self.row_weights = row_weights
        self.with_gradient = with_gradient
        self.gradient = rows.new_empty(rows.shape) if with_gradient else rows.new_empty(0)
        self._shape = rows.shape
        self._parts: list[tuple[Tensor, ...]] = []

    def chunks(self, part: slice | None = None) -> Iterator[Rows]:
        """The weighted rows of the batch, or of one part of it, in order."""
        first, last = (part.start, part.stop) if part else (0, self._shape[0])
        on_cpu = self.row_weights.device.type == "cpu"
        values = torch.get_num_threads() * CACHED_VALUES if on_cpu else CHUNK_VALUES_ELSEWHERE
        for chunk in row_chunks(last - first, self._shape[1], values=values):
            yield Rows(self.row_weights, slice(first + chunk.start, first + chunk.stop))

    def add(self, rows: Rows, *per_row: Tensor) -> None:
        """Take loss, entropy and agreement (n,) of a chunk's rows."""
        self._parts.append((rows.weights, *per_row))

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted sums of what was added, missing ones 0, float32; and the gradient."""
        totals = self.row_weights.new_zeros(3, dtype=torch.float64)
        columns = [torch.cat(column).double() for column in zip(*self._parts)]
        for i, column in enumerate(columns[1:]):
            totals[i] = (columns[0] * column).sum()
        loss, entropy, agreement = (total.float() for total in totals)
        return loss, entropy, agreement, self.gradient


def first_largest(values: Tensor) -> Tensor:
    """Index of the first of the largest values of each row (n, K): (n,) int64.

    `argmax` reads one value at a time; the largest of each group of 32 is found by vectors, then
    argmax looks for the group and within it (120 against 20 us for 64 rows of 1,024 on one core).
    """
    n, K = values.shape
    if K % 32 or K < 128:
        return values.argmax(1)
    groups = values.reshape(n, K // 32, 32)
    group = groups.amax(2).argmax(1)
    within = groups[torch.arange(n, device=values.device), group].argmax(1)
    return 32 * group + within
