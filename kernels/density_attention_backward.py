"""The gradients of density-adaptive attention; notation and forward: density_attention.py.

With D the gradient of L, and sums over the time of a chunk of n frames:

    D = w (g x - sum w g x)
    h = sum_j [u_j^2 <= 100] u_j / c_j,  r = sum_j [u_j^2 <= 100] u_j^2 / c_j
    dx = g + g w - D h / std + (sum D h / n + z sum D r / (n - 1)) / std
    do_j = sum D [u_j^2 <= 100] u_j / (c_j std),  dc_j = sum D min(u_j^2, 100) / (2 c_j^2)

g (B, T, C) of x's dtype; dx dense, of x's dtype, and dx = g where out = x.

Moments are computed once more, and with softmax's sum comes that of w g x (density_chunks.py).
Then one pass over x and g adds up what is a sum of D, and one gives dx. For do and dc each program
leaves eight partial sums, which are added in float64 in a fixed order.

Source: gmm_jepa.ops.density.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .density_chunks import (
    CHUNKS,
    FARTHEST,
    GAUSSIANS,
    LOG2_E,
    Passes,
    channels_of,
    copy_rest,
    gaussians_of,
    log_density,
    merged,
    none_clamped,
    partials_of,
    piece_of,
    scaling_of,
    softmax_of,
    standardised,
    tile_of,
    values_of,
    weights_of,
)

SLOPES = tl.constexpr(2)
ROWS = 2  # of a tile: so many values are kept of each frame; not measured yet


@triton.jit
def _of_density(x, g, w, softmax):
    """D of a tile."""
    return w * (g * x - softmax[2][None, None, :])


@triton.jit
def _of_gaussian(d, z, scaling, gaussians, j: tl.constexpr):
    """Sums over ROWS of D u and D min(u^2, 100), and k u^2 of a tile, u of the j-th Gaussian."""
    u = z - gaussians[j] * scaling[2][None, None, :]
    square = u * u
    inside = tl.where(square <= FARTHEST, u, 0.0)
    of_width = tl.sum(d * tl.minimum(square, FARTHEST), axis=1)
    return tl.sum(d * inside, axis=1), of_width, gaussians[GAUSSIANS + j] * inside * u


@triton.jit
def _add_slopes(
    sums, x, g, scaling, softmax, gaussians, mask_t, MASKED: tl.constexpr, MERGED: tl.constexpr
):  # fmt: skip
    """Sums (SLOTS, BLOCK_C) over time with ROWS frames more.

    Of D u_j, then of D min(u_j^2, 100), then of D k_j u_j^2 over all j within the clamp; of the
    merged Gaussian, those of D, D u and D u^2.
    """
    z = standardised(x, scaling)
    w = weights_of(log_density(z, scaling, gaussians, MERGED), softmax)
    d = _of_density(x, g, w, softmax)
    if MASKED:
        d = tl.where(mask_t, d, 0.0)
    if MERGED:
        s0, s1, s2 = sums
        d_z = d * z
        s0 += tl.sum(d, axis=1)
        s1 += tl.sum(d_z, axis=1)
        s2 += tl.sum(d_z * z, axis=1)
        return s0, s1, s2
    else:
        p0, p1, p2, p3, q0, q1, q2, q3, r = sums
        of_0, to_0, r_0 = _of_gaussian(d, z, scaling, gaussians, 0)
        of_1, to_1, r_1 = _of_gaussian(d, z, scaling, gaussians, 1)
        of_2, to_2, r_2 = _of_gaussian(d, z, scaling, gaussians, 2)
        of_3, to_3, r_3 = _of_gaussian(d, z, scaling, gaussians, 3)
        r += tl.sum(d * (r_0 + r_1 + r_2 + r_3), axis=1)
        p0, p1, p2, p3 = p0 + of_0, p1 + of_1, p2 + of_2, p3 + of_3
        return p0, p1, p2, p3, q0 + to_0, q1 + to_1, q2 + to_2, q3 + to_3, r


@triton.jit
def _slopes_of_piece(
    x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling, gaussians, softmax, sums,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """`sums` and what n frames from t0 on add to them."""
    whole = n // (ROWS * SLOTS) * (ROWS * SLOTS)
    for i in range(0, whole, ROWS * SLOTS):
        mask = mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + i, T, offsets, mask, C, C % BLOCK_C != 0)
        g = values_of(g_ptr, row, t0 + i, T, offsets, mask, C, C % BLOCK_C != 0)
        sums = _add_slopes(sums, x, g, scaling, softmax, gaussians, mask, False, MERGED)
    if n > whole:
        mask_t = offs_t < n - whole
        mask = mask_t & mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + whole, T, offsets, mask, C, True)
        g = values_of(g_ptr, row, t0 + whole, T, offsets, mask, C, True)
        sums = _add_slopes(sums, x, g, scaling, softmax, gaussians, mask_t, True, MERGED)
    return sums


@triton.jit
def _of_each(sums, inverse, gaussians, j: tl.constexpr):
    """Sums (BLOCK_C,) of D u_j and D u_j^2 from those of the merged Gaussian."""
    s0, s1, s2 = sums
    b = (gaussians[2 * GAUSSIANS + 1] - gaussians[j]) * inverse
    return s1 + b * s0, s2 + b * (2 * s1 + b * s0)


@triton.jit
def _slopes(
    x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling, gaussians, softmax, easy,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Nine sums (BLOCK_C,) over a piece, in the order of `_add_slopes`."""
    o = tl.zeros((SLOTS, BLOCK_C), dtype=tl.float32)
    if easy:
        s0, s1, s2 = _slopes_of_piece(
            x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, merged(scaling, gaussians),
            gaussians, softmax, (o, o, o), C, BLOCK_C, ROWS, SLOTS, True,
        )  # fmt: skip
        sums = (tl.sum(s0, axis=0), tl.sum(s1, axis=0), tl.sum(s2, axis=0))
        p0, q0 = _of_each(sums, scaling[2], gaussians, 0)
        p1, q1 = _of_each(sums, scaling[2], gaussians, 1)
        p2, q2 = _of_each(sums, scaling[2], gaussians, 2)
        p3, q3 = _of_each(sums, scaling[2], gaussians, 3)
        r = gaussians[4] * q0 + gaussians[5] * q1 + gaussians[6] * q2 + gaussians[7] * q3
    else:
        p0, p1, p2, p3, q0, q1, q2, q3, r = _slopes_of_piece(
            x_ptr, g_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling,
            gaussians, softmax, (o, o, o, o, o, o, o, o, o), C, BLOCK_C, ROWS, SLOTS, False,
        )  # fmt: skip
        p0, p1, p2, p3 = tl.sum(p0, 0), tl.sum(p1, 0), tl.sum(p2, 0), tl.sum(p3, 0)
        q0, q1, q2, q3 = tl.sum(q0, 0), tl.sum(q1, 0), tl.sum(q2, 0), tl.sum(q3, 0)
        r = tl.sum(r, 0)
    return p0, p1, p2, p3, q0, q1, q2, q3, r


@triton.jit(do_not_specialize=["T", "frames", "n_pieces"])
def _density_slopes_kernel(
    x_ptr, g_ptr, lengths_ptr, offsets_ptr, widths_ptr, moments_ptr, sums_ptr, slopes_ptr,
    parameters_ptr, T, frames, n_pieces,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PIECES: tl.constexpr, RAGGED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    program, row, column, piece, offs_c, start, count, _ = piece_of(
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
    softmax = softmax_of(sums_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, PIECES, True)
    gaussians = gaussians_of(offsets_ptr, widths_ptr, column)
    easy = none_clamped(moments_ptr, column, piece, offs_c, mask_c, n_pieces, scaling, gaussians, C)
    sums = _slopes(
        x_ptr, g_ptr, row, start + piece * frames, n, T, offs_t, offsets, mask_c, scaling,
        gaussians, softmax, easy, C, BLOCK_C, ROWS, SLOTS,
    )  # fmt: skip
    of_h = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for j in tl.static_range(GAUSSIANS):
        inverse_c = gaussians[GAUSSIANS + j] * (2 / LOG2_E)
        of_u = sums[j] * inverse_c
        of_h += of_u
        of_c = sums[GAUSSIANS + j] * (0.5 * inverse_c * inverse_c)
        to = parameters_ptr + program.to(tl.int64) * (2 * GAUSSIANS) + j
        tl.store(to, tl.sum(tl.where(mask_c, of_u * scaling[2], 0.0), axis=0))
        tl.store(to + GAUSSIANS, tl.sum(tl.where(mask_c, of_c, 0.0), axis=0))
    at = (column.to(tl.int64) * n_pieces + piece) * SLOPES * C + offs_c
    tl.store(slopes_ptr + at, of_h, mask=mask_c)
    tl.store(slopes_ptr + at + C, sums[2 * GAUSSIANS] * (2 / LOG2_E), mask=mask_c)


@triton.jit
def _dx_of_piece(
    x_ptr, g_ptr, dx_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling, gaussians, softmax,
    of_mean, of_std, C: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """dx of n frames from t0 on."""
    inverse = scaling[2]
    of_h = inverse * (2 / LOG2_E)
    for i in range(0, n, TILE):
        mask = (offs_t < n - i) & mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + i, T, offsets, mask, C, True)
        g = values_of(g_ptr, row, t0 + i, T, offsets, mask, C, True)
        z = standardised(x, scaling)
        if MERGED:
            h = gaussians[2 * GAUSSIANS] * z
        else:
            h = tl.zeros_like(z)
            for j in tl.static_range(GAUSSIANS):
                u = z - gaussians[j] * inverse[None, None, :]
                h += gaussians[GAUSSIANS + j] * tl.where(u * u <= FARTHEST, u, 0.0)
        w = weights_of(log_density(z, scaling, gaussians, MERGED), softmax)
        d_x = of_mean[None, None, :] + of_std[None, None, :] * z
        d_x -= _of_density(x, g, w, softmax) * h * of_h[None, None, :]
        d_x += g + g * w
        dx_ptrs = dx_ptr + (row * T + t0 + i) * C + offsets
        tl.store(dx_ptrs, d_x.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "frames", "n_pieces"])
def _density_dx_kernel(
    x_ptr, g_ptr, lengths_ptr, offsets_ptr, widths_ptr, moments_ptr, sums_ptr, slopes_ptr, dx_ptr,
    T, frames, n_pieces,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    PIECES: tl.constexpr, RAGGED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    _, row, column, piece, offs_c, start, count, behind = piece_of(
        lengths_ptr, T, frames, n_pieces, C, BLOCK_C, RAGGED, REVERSED
    )
    TILE: tl.constexpr = ROWS * SLOTS
    mask_c = channels_of(offs_c, C, BLOCK_C)
    offs_t, offsets = tile_of(offs_c, C, ROWS, SLOTS)
    copy_rest(
        g_ptr, dx_ptr, row, column, piece, offs_t, offsets, mask_c, behind, T, frames, n_pieces,
        C, TILE,
    )  # fmt: skip
    n = tl.minimum(count - piece * frames, frames)
    if n <= 0:
        return
    scaling = scaling_of(
        x_ptr, moments_ptr, row, column, start, offs_c, mask_c, count, T, frames, n_pieces,
        C, PIECES,
    )  # fmt: skip
    softmax = softmax_of(sums_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, PIECES, True)
    ptrs, some, _ = partials_of(
        slopes_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, SLOPES, PIECES
    )
    inverse = scaling[2]
    of_mean = tl.sum(tl.load(ptrs, mask=some, other=0.0), axis=0) / count * inverse
    of_std = tl.sum(tl.load(ptrs + C, mask=some, other=0.0), axis=0) / (count - 1) * inverse
    gaussians = gaussians_of(offsets_ptr, widths_ptr, column)
    t0 = start + piece * frames
    easy = none_clamped(moments_ptr, column, piece, offs_c, mask_c, n_pieces, scaling, gaussians, C)
    if easy:
        of_mean += of_std * (gaussians[2 * GAUSSIANS + 1] * inverse)
        _dx_of_piece(
            x_ptr, g_ptr, dx_ptr, row, t0, n, T, offs_t, offsets, mask_c,
            merged(scaling, gaussians), gaussians, softmax, of_mean, of_std, C, TILE, True,
        )  # fmt: skip
    else:
        _dx_of_piece(
            x_ptr, g_ptr, dx_ptr, row, t0, n, T, offs_t, offsets, mask_c,
            scaling, gaussians, softmax, of_mean, of_std, C, TILE, False,
        )  # fmt: skip


def density_attention_backward(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    squared_widths: Tensor,
    lengths_frames: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, T, C), offsets and squared widths (4, 4), each of its own dtype."""
    d_x, gaussians = x.new_empty(x.shape), 2 * GAUSSIANS.value
    if x.numel() == 0:
        return d_x, *(t.new_zeros(t.shape) for t in (offsets, squared_widths))
    grad = grad.contiguous()
    with torch.cuda.device_of(x):
        passes = Passes(x.contiguous(), offsets, squared_widths, lengths_frames)
        passes.statistics(grad)
        slopes = passes.partials(SLOPES)
        # programs beyond the end of a chunk write nothing
        parameters = x.new_zeros((passes.grid[0], gaussians), dtype=torch.float32)
        inputs = (passes.x, grad, passes.lengths, *passes.gaussians, passes.moments, passes.sums)
        options = {**passes.options, "ROWS": ROWS}
        _density_slopes_kernel[passes.grid](
            *inputs, slopes, parameters, *passes.sizes, **options, REVERSED=False
        )
        _density_dx_kernel[passes.grid](
            *inputs, slopes, d_x, *passes.sizes, **options, REVERSED=True
        )
        of_chunks = parameters.view(len(x), CHUNKS.value, -1, gaussians)
        d_offsets, d_widths = of_chunks.sum((0, 2), dtype=torch.float64).chunk(2, dim=1)
        narrow = d_offsets.to(offsets.dtype), d_widths.to(squared_widths.dtype)
    return d_x, *(t.contiguous() for t in narrow)
