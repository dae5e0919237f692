"""Density-adaptive attention over time, frame-major.

In each quarter ("chunk") of a row's n real frames, for every channel and with j = 1..4:

    z = (x - mean) / std,  std^2 = unbiased variance + 1e-8,  u_j = z - o_j / std
    L = -sum_j min(u_j^2, 100) / (2 c_j),  w = softmax_time(L),  out = x + x w

x (B, T, C) float32, bf16 or float16; offsets o and squared widths c (4, 4); out dense, of x's
dtype. Arithmetic is float32. Frames behind n, and all of a row of fewer than 8 real ones, pass:
out = x.

Three passes over x: moments, the sum of softmax (density_chunks.py), and the output.

Source: gmm_jepa.ops.density.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .density_chunks import (
    Passes,
    channels_of,
    copy_rest,
    gaussians_of,
    log_density,
    merged,
    none_clamped,
    piece_of,
    scaling_of,
    softmax_of,
    standardised,
    tile_of,
    values_of,
    weights_of,
)


@triton.jit
def _out_of_piece(
    x_ptr, out_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling, gaussians, softmax,
    C: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """x + x w of n frames from t0 on."""
    for i in range(0, n, TILE):
        mask = (offs_t < n - i) & mask_c[None, None, :]
        x = values_of(x_ptr, row, t0 + i, T, offsets, mask, C, True)
        density = log_density(standardised(x, scaling), scaling, gaussians, MERGED)
        out = x + x * weights_of(density, softmax)
        out_ptrs = out_ptr + (row * T + t0 + i) * C + offsets
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "frames", "n_pieces"])
def _density_out_kernel(
    x_ptr, lengths_ptr, offsets_ptr, widths_ptr, moments_ptr, sums_ptr, out_ptr,
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
        x_ptr, out_ptr, row, column, piece, offs_t, offsets, mask_c, behind, T, frames, n_pieces,
        C, TILE,
    )  # fmt: skip
    n = tl.minimum(count - piece * frames, frames)
    if n <= 0:
        return
    scaling = scaling_of(
        x_ptr, moments_ptr, row, column, start, offs_c, mask_c, count, T, frames, n_pieces,
        C, PIECES,
    )  # fmt: skip
    softmax = softmax_of(
        sums_ptr, column, offs_c, mask_c, count, frames, n_pieces, C, PIECES, False
    )
    gaussians = gaussians_of(offsets_ptr, widths_ptr, column)
    t0 = start + piece * frames
    easy = none_clamped(moments_ptr, column, piece, offs_c, mask_c, n_pieces, scaling, gaussians, C)
    if easy:
        _out_of_piece(
            x_ptr, out_ptr, row, t0, n, T, offs_t, offsets, mask_c, merged(scaling, gaussians),
            gaussians, softmax, C, TILE, True,
        )  # fmt: skip
    else:
        _out_of_piece(
            x_ptr, out_ptr, row, t0, n, T, offs_t, offsets, mask_c, scaling,
            gaussians, softmax, C, TILE, False,
        )  # fmt: skip


def density_attention(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
) -> Tensor:
    """x + x w (B, T, C), dense, of x's dtype."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        passes = Passes(x.contiguous(), offsets, squared_widths, lengths_frames)
        passes.statistics(None)
        _density_out_kernel[passes.grid](
            passes.x,
            passes.lengths,
            *passes.gaussians,
            passes.moments,
            passes.sums,
            out,
            *passes.sizes,
            **passes.options,
            REVERSED=False,
        )
    return out
