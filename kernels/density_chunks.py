"""What density-adaptive attention and its gradients share; notation: density_attention.py.

A chunk is cut into at most MAX_PIECES pieces, one a program and block of channels. The sums over
time that a pass needs are those of the pass before: each program leaves one partial a piece and
channel in memory, and those of a chunk are merged, in their order, by every program that follows.
No atomics: same input, same bits. A pass takes the programs in the reverse order of the one before:
what it left in the L2 cache is what the next one reads first.

For the moments x is taken relative to its chunk's first frame, which is within sqrt(n) std of the
mean, and afterwards relative to the mean in two parts: a large offset costs nothing. In a piece
each thread adds ROWS frames at a time to the mean and squared deviations of its own (Chan, Golub
and LeVeque); pieces are merged likewise. Softmax keeps its maximum and its sum apart: in silent
channels L reaches -1e5, and their logarithm would lose digits.

Where no u of a piece is clamped, which its outermost x tell, the four Gaussians are one:
with k_j = 1 / (2 c_j), k = sum_j k_j and o = sum_j k_j o_j / k,

    sum_j k_j u_j^2 = k (z - o / std)^2 + sum_j k_j (o_j - o)^2 / std^2

Other pieces of the chunk may take the sum itself: it has the same value, to rounding. Instructions
a value, counted in the code for sm_90, C = 64, bf16: 11 for moments, then for one Gaussian (four)
in the passes of softmax with g 16 (31), output 13 (27), sums of D 20 (59), dx 23 (51).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS = tl.constexpr(4)
GAUSSIANS = tl.constexpr(4)
MIN_FRAMES = tl.constexpr(8)
MAX_PIECES = 16  # of a chunk; a program merges the partials of all of them
LEAST_FRAMES = 128  # of a piece
MOMENTS = tl.constexpr(4)  # mean, squared deviations, least and largest x
SUMS = tl.constexpr(3)  # maximum and sum of exp(L), sum of exp(L) g x
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
FARTHEST = tl.constexpr(100.0)  # u^2
VECTOR = tl.constexpr(4)


@triton.jit
def piece_of(
    lengths_ptr, T, frames, n_pieces,
    C: tl.constexpr, BLOCK_C: tl.constexpr, RAGGED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Program, row, column (row and chunk), piece and channels; the chunk's first frame and length.

    Last comes how many frames of the row have a chunk.
    """
    n_channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    # so that a thread takes no more than VECTOR channels, of each of which it keeps so many values
    lanes = tl.multiple_of(tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR), VECTOR)
    offs_c = program % n_channel_blocks * BLOCK_C + lanes
    column = program // n_channel_blocks // n_pieces
    piece = program // n_channel_blocks % n_pieces
    row, chunk = column // CHUNKS, column % CHUNKS
    n = T
    if RAGGED:
        n = tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), T).to(tl.int32)
    n = tl.where(n >= MIN_FRAMES, n, 0)
    size = n // CHUNKS
    count = tl.where(chunk == CHUNKS - 1, n - (CHUNKS - 1) * size, size)
    return program, row.to(tl.int64), column, piece, offs_c, chunk * size, count, n


@triton.jit
def channels_of(offs_c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,) whether a channel exists; known beforehand where all blocks are full."""
    return tl.full((BLOCK_C,), True, dtype=tl.int1) if C % BLOCK_C == 0 else offs_c < C


@triton.jit
def tile_of(offs_c, C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Frames (SLOTS, ROWS, 1) of a tile and offsets (SLOTS, ROWS, BLOCK_C) of its values.

    Frames of one slot belong to one thread, so sums over ROWS stay in registers.
    """
    offs_t = tl.arange(0, ROWS)[None, :, None] * SLOTS + tl.arange(0, SLOTS)[:, None, None]
    return offs_t, offs_t * C + offs_c[None, None, :]


@triton.jit
def values_of(ptr, row, t, T, offsets, mask, C: tl.constexpr, MASKED: tl.constexpr):
    """The tile at frame t of a row, in float32."""
    ptrs = ptr + (row * T + t) * C + offsets
    if MASKED:
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return tl.load(ptrs).to(tl.float32)


@triton.jit
def _add_moments(
    mean, squares, seen, d, mask_t, ROWS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Mean and squared deviations (SLOTS, BLOCK_C) of `seen` frames a slot and ROWS more."""
    if MASKED:
        d = tl.where(mask_t, d, 0.0)
        n = tl.sum(mask_t.to(tl.float32), axis=1)
        of_rows = tl.sum(d, axis=1) / tl.maximum(n, 1.0)
        deviations = tl.where(mask_t, d - of_rows[:, None, :], 0.0)
        share = n / tl.maximum(seen + n, 1.0)
    else:
        of_rows = tl.sum(d, axis=1) * (1.0 / ROWS)
        deviations = d - of_rows[:, None, :]
        share = ROWS / (seen + ROWS)
    step = of_rows - mean
    squares += tl.sum(deviations * deviations, axis=1) + step * step * (share * seen)
    return mean + step * share, squares


@triton.jit(do_not_specialize=["T", "frames", "n_pieces"])
def _density_moments_kernel(
    x_ptr, lengths_ptr, moments_ptr, T, frames, n_pieces,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    RAGGED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    _, row, column, piece, offs_c, start, count, _ = piece_of(
        lengths_ptr, T, frames, n_pieces, C, BLOCK_C, RAGGED, REVERSED
    )
    n = tl.minimum(count - piece * frames, frames)
    if n <= 0:
        return
    TILE: tl.constexpr = ROWS * SLOTS
    mask_c = channels_of(offs_c, C, BLOCK_C)
    offs_t, offsets = tile_of(offs_c, C, ROWS, SLOTS)
    shift = tl.load(x_ptr + (row * T + start) * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean = tl.zeros((SLOTS, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((SLOTS, BLOCK_C), dtype=tl.float32)
    low = tl.full((SLOTS, BLOCK_C), float("inf"), dtype=tl.float32)
    high = -low
    t0 = start + piece * frames
    whole = n // TILE * TILE
    for i in range(0, whole, TILE):
        mask = mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + i, T, offsets, mask, C, C % BLOCK_C != 0)
        low = tl.minimum(low, tl.min(x, axis=1))
        high = tl.maximum(high, tl.max(x, axis=1))
        seen = i * (1.0 / SLOTS)
        mean, squares = _add_moments(
            mean, squares, seen, x - shift[None, None, :], mask, ROWS, False
        )
    mask_t = offs_t < n - whole
    if n > whole:
        x = values_of(x_ptr, row, t0 + whole, T, offsets, mask_t & mask_c[None, None, :], C, True)
        low = tl.minimum(low, tl.min(tl.where(mask_t, x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(mask_t, x, float("-inf")), axis=1))
        seen = whole * (1.0 / SLOTS)
        mean, squares = _add_moments(
            mean, squares, seen, x - shift[None, None, :], mask_t, ROWS, True
        )
    seen = whole * (1.0 / SLOTS) + tl.sum(mask_t.to(tl.float32), axis=1)  # (SLOTS, 1)
    of_piece = tl.sum(seen * mean, axis=0) / n
    step = mean - of_piece[None, :]
    squares = tl.sum(squares + seen * step * step, axis=0)
    at = (column.to(tl.int64) * n_pieces + piece) * MOMENTS * C + offs_c
    tl.store(moments_ptr + at, of_piece, mask=mask_c)
    tl.store(moments_ptr + at + C, squares, mask=mask_c)
    tl.store(moments_ptr + at + 2 * C, tl.min(low, axis=0), mask=mask_c)
    tl.store(moments_ptr + at + 3 * C, tl.max(high, axis=0), mask=mask_c)


@triton.jit
def partials_of(
    ptr, column, offs_c, mask_c, count, frames, n_pieces,
    C: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Pointers (PIECES, BLOCK_C) to the first of KINDS partials, which exist, and their frames."""
    offs_p = tl.arange(0, PIECES)
    n = tl.minimum(tl.maximum(count - offs_p * frames, 0), frames)[:, None]
    rows = (column.to(tl.int64) * n_pieces + offs_p)[:, None] * (KINDS * C)
    return ptr + rows + offs_c[None, :], (n > 0) & mask_c[None, :], n.to(tl.float32)


@triton.jit
def scaling_of(
    x_ptr, moments_ptr, row, column, start, offs_c, mask_c, count, T, frames, n_pieces,
    C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C,) the mean of a chunk, what it lacks over std, and 1 / std."""
    ptrs, mask, n = partials_of(
        moments_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, MOMENTS, PIECES
    )
    means = tl.load(ptrs, mask=mask, other=0.0)
    squares = tl.load(ptrs + C, mask=mask, other=0.0)
    from_shift = tl.sum(n * means, axis=0) / count
    step = means - from_shift[None, :]
    variance = tl.sum(squares + n * step * step, axis=0) / (count - 1)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-8))
    shift = tl.load(x_ptr + (row * T + start) * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean = shift + from_shift
    rounded = mean - shift
    lacking = (shift - (mean - rounded)) + (from_shift - rounded)
    return mean, lacking * inverse, inverse


@triton.jit
def gaussians_of(offsets_ptr, widths_ptr, column):
    """Of the column's chunk: four offsets, four times k = log2(e) / (2 c), and what follows.

    That is the sum of k, the mean of the offsets weighted by k, and the sum of k times their
    squared distances to it.
    """
    at = column % CHUNKS * GAUSSIANS
    o_ptr, c_ptr = offsets_ptr + at, widths_ptr + at
    o0 = tl.load(o_ptr).to(tl.float32)
    o1 = tl.load(o_ptr + 1).to(tl.float32)
    o2 = tl.load(o_ptr + 2).to(tl.float32)
    o3 = tl.load(o_ptr + 3).to(tl.float32)
    k0 = tl.div_rn(0.5 * LOG2_E, tl.load(c_ptr).to(tl.float32))
    k1 = tl.div_rn(0.5 * LOG2_E, tl.load(c_ptr + 1).to(tl.float32))
    k2 = tl.div_rn(0.5 * LOG2_E, tl.load(c_ptr + 2).to(tl.float32))
    k3 = tl.div_rn(0.5 * LOG2_E, tl.load(c_ptr + 3).to(tl.float32))
    k = k0 + k1 + k2 + k3
    o = tl.div_rn(k0 * o0 + k1 * o1 + k2 * o2 + k3 * o3, k)
    spread = k0 * (o0 - o) * (o0 - o) + k1 * (o1 - o) * (o1 - o)
    spread += k2 * (o2 - o) * (o2 - o) + k3 * (o3 - o) * (o3 - o)
    return o0, o1, o2, o3, k0, k1, k2, k3, k, o, spread


@triton.jit
def merged(scaling, gaussians):
    """The scaling whose z is u of the one Gaussian that four are while no u is clamped."""
    mean, lacking, inverse = scaling
    return mean, lacking + gaussians[2 * GAUSSIANS + 1] * inverse, inverse


@triton.jit
def none_clamped(
    moments_ptr, column, piece, offs_c, mask_c, n_pieces, scaling, gaussians, C: tl.constexpr
):  # fmt: skip
    """Whether all u of a piece are within the clamp: the outermost x of each channel are."""
    mean, lacking, inverse = scaling
    at = (column.to(tl.int64) * n_pieces + piece) * (MOMENTS * C) + offs_c
    low = tl.load(moments_ptr + at + 2 * C, mask=mask_c, other=0.0)
    high = tl.load(moments_ptr + at + 3 * C, mask=mask_c, other=0.0)
    low = (low - mean) * inverse - lacking
    high = (high - mean) * inverse - lacking
    farthest = tl.zeros_like(low)
    for j in tl.static_range(GAUSSIANS):
        b = gaussians[j] * inverse
        farthest = tl.maximum(farthest, tl.maximum(high - b, b - low))
    inside = (farthest <= 10.0) | (mask_c == 0)
    return tl.min(inside.to(tl.int32), axis=0) > 0


@triton.jit
def standardised(x, scaling):
    """z of a tile."""
    mean, lacking, inverse = scaling
    return (x - mean[None, None, :]) * inverse[None, None, :] - lacking[None, None, :]


@triton.jit
def log_density(z, scaling, gaussians, MERGED: tl.constexpr):
    """L log2(e) of a tile."""
    inverse = scaling[2]
    if MERGED:
        highest = -gaussians[2 * GAUSSIANS + 2] * inverse * inverse
        density = highest[None, None, :] - gaussians[2 * GAUSSIANS] * z * z
    else:
        density = tl.zeros_like(z)
        for j in tl.static_range(GAUSSIANS):
            u = z - gaussians[j] * inverse[None, None, :]
            density -= gaussians[GAUSSIANS + j] * tl.minimum(u * u, FARTHEST)
    return density


@triton.jit
def copy_rest(
    from_ptr, to_ptr, row, column, piece, offs_t, offsets, mask_c, n, T, frames, n_pieces,
    C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Frames without a chunk, those from n on, shared out among the programs of a row."""
    begin = n + (column % CHUNKS * n_pieces + piece) * frames
    for t in range(begin, tl.minimum(begin + frames, T), TILE):
        mask = (offs_t < T - t) & mask_c[None, None, :]
        at = (row * T + t) * C + offsets
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _add_softmax(
    sums, x, g, scaling, gaussians, mask_t,
    WITH_GRAD: tl.constexpr, MASKED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and, with g, sum of g x (SLOTS, BLOCK_C) of exp(L) with ROWS frames more."""
    most, total, inner = sums
    density = log_density(standardised(x, scaling), scaling, gaussians, MERGED)
    if MASKED:
        density = tl.where(mask_t, density, float("-inf"))
    larger = tl.maximum(most, tl.max(density, axis=1))
    weights = tl.exp2(density - larger[:, None, :])
    fewer = tl.exp2(most - larger)
    total = total * fewer + tl.sum(weights, axis=1)
    if WITH_GRAD:
        inner = inner * fewer + tl.sum(weights * (g * x), axis=1)
    return larger, total, inner


@triton.jit
def _softmax_of_piece(
    x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling, gaussians,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    WITH_GRAD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and, with g, sum of g x (SLOTS, BLOCK_C) of exp(L) over n frames from t0 on."""
    most = tl.full((SLOTS, BLOCK_C), LEAST, dtype=tl.float32)
    zeros = tl.zeros((SLOTS, BLOCK_C), dtype=tl.float32)
    sums = (most, zeros, zeros)
    whole = n // (ROWS * SLOTS) * (ROWS * SLOTS)
    for i in range(0, whole, ROWS * SLOTS):
        mask = mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + i, T, offsets, mask, C, C % BLOCK_C != 0)
        g = x
        if WITH_GRAD:
            g = values_of(g_ptr, row, t0 + i, T, offsets, mask, C, C % BLOCK_C != 0)
        sums = _add_softmax(sums, x, g, scaling, gaussians, mask, WITH_GRAD, False, MERGED)
    if n > whole:
        mask_t = offs_t < n - whole
        mask = mask_t & mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + whole, T, offsets, mask, C, True)
        g = x
        if WITH_GRAD:
            g = values_of(g_ptr, row, t0 + whole, T, offsets, mask, C, True)
        sums = _add_softmax(sums, x, g, scaling, gaussians, mask_t, WITH_GRAD, True, MERGED)
    return sums


@triton.jit(do_not_specialize=["T", "frames", "n_pieces"])
def _density_softmax_kernel(
    x_ptr, g_ptr, lengths_ptr, offsets_ptr, widths_ptr, moments_ptr, sums_ptr, T, frames, n_pieces,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PIECES: tl.constexpr, RAGGED: tl.constexpr, REVERSED: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    _, row, column, piece, offs_c, start, count, _ = piece_of(
        lengths_ptr, T, frames, n_pieces, C, BLOCK_C, RAGGED, REVERSED
    )
    n = tl.minimum(count - piece * frames, frames)
    if n <= 0:
        return
    mask_c = channels_of(offs_c, C, BLOCK_C)
    offs_t, offsets = tile_of(offs_c, C, ROWS, SLOTS)
    scaling = scaling_of(
        x_ptr, moments_ptr, row, column, start, offs_c, mask_c, count, T, frames, n_pieces,
        C, PIECES,
    )  # fmt: skip
    gaussians = gaussians_of(offsets_ptr, widths_ptr, column)
    t0 = start + piece * frames
    easy = none_clamped(moments_ptr, column, piece, offs_c, mask_c, n_pieces, scaling, gaussians, C)
    if easy:
        most, total, inner = _softmax_of_piece(
            x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, merged(scaling, gaussians),
            gaussians, C, BLOCK_C, ROWS, SLOTS, WITH_GRAD, True,
        )  # fmt: skip
    else:
        most, total, inner = _softmax_of_piece(
            x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling,
            gaussians, C, BLOCK_C, ROWS, SLOTS, WITH_GRAD, False,
        )  # fmt: skip
    largest = tl.max(most, axis=0)
    fewer = tl.exp2(most - largest[None, :])
    at = (column.to(tl.int64) * n_pieces + piece) * SUMS * C + offs_c
    tl.store(sums_ptr + at, largest, mask=mask_c)
    tl.store(sums_ptr + at + C, tl.sum(total * fewer, axis=0), mask=mask_c)
    if WITH_GRAD:
        tl.store(sums_ptr + at + 2 * C, tl.sum(inner * fewer, axis=0), mask=mask_c)


@triton.jit
def softmax_of(
    sums_ptr, column, offs_c, mask_c, count, frames, n_pieces,
    C: tl.constexpr, PIECES: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C,) maximum and 1 / sum of exp(L) in a chunk and, with g, the mean of g x."""
    ptrs, mask, _ = partials_of(
        sums_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, SUMS, PIECES
    )
    most = tl.load(ptrs, mask=mask, other=LEAST)
    largest = tl.where(mask_c, tl.max(most, axis=0), 0.0)
    fewer = tl.exp2(most - largest[None, :])
    total = tl.sum(tl.load(ptrs + C, mask=mask, other=0.0) * fewer, axis=0)
    inverse = tl.div_rn(1.0, tl.where(mask_c, total, 1.0))
    inner = inverse
    if WITH_GRAD:
        inner *= tl.sum(tl.load(ptrs + 2 * C, mask=mask, other=0.0) * fewer, axis=0)
    return largest, inverse, inner


@triton.jit
def weights_of(density, softmax):
    """w of a tile."""
    return tl.exp2(density - softmax[0][None, None, :]) * softmax[1][None, None, :]


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tile: 128 bytes of channels, 4 channels of 4 frames a thread; not measured yet.

    There are as many slots as 128 threads of 4 channels each cover.
    """
    return {
        "BLOCK_C": 128 // dtype.itemsize,
        "ROWS": 4,
        "SLOTS": 4 * dtype.itemsize,
        "num_warps": 4,
    }


class Passes:
    """What all passes over one x (B, T, C), dense and not empty, have in common."""

    def __init__(
        self, x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
    ) -> None:
        B, T, C = x.shape
        self.x, self.gaussians = x, (offsets.contiguous(), squared_widths.contiguous())
        self.lengths = x if lengths_frames is None else lengths_frames.contiguous()
        tile = config(x.dtype)
        step = tile["ROWS"] * tile["SLOTS"]
        most = T // CHUNKS.value + CHUNKS.value - 1  # frames of a chunk
        frames = triton.cdiv(max(LEAST_FRAMES, triton.cdiv(most, MAX_PIECES)), step) * step
        self.sizes = (T, frames, triton.cdiv(most, frames))
        self.columns = B * CHUNKS.value
        self.grid = (self.columns * self.sizes[2] * triton.cdiv(C, tile["BLOCK_C"]),)
        self.tile = {"C": C, "RAGGED": lengths_frames is not None, **tile}
        self.options = {**self.tile, "PIECES": MAX_PIECES}
        self.moments, self.sums = self.partials(MOMENTS), self.partials(SUMS)

    def partials(self, kinds: tl.constexpr) -> Tensor:
        """Room for so many numbers a piece and channel, float32."""
        shape = (self.columns, self.sizes[2], kinds.value, self.x.shape[2])
        return self.x.new_empty(shape, dtype=torch.float32)

    def statistics(self, grad: Tensor | None) -> None:
        """Moments and the sums of softmax: what both ways begin with."""
        _density_moments_kernel[self.grid](
            self.x, self.lengths, self.moments, *self.sizes, **self.tile, REVERSED=False
        )
        _density_softmax_kernel[self.grid](
            self.x,
            self.x if grad is None else grad,
            self.lengths,
            *self.gaussians,
            self.moments,
            self.sums,
            *self.sizes,
            **self.options,
            REVERSED=True,
            WITH_GRAD=grad is not None,
        )
