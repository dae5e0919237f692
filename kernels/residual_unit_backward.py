"""The gradients of a residual unit; notation and tiles: residual_unit.py.

With g the gradient of y, and lrelu' one where its result is above zero and 0.1 elsewhere,

    da[t] = sum_k W2[k] keep g[t - k + 1]               dh = keep lrelu'(a) da
    dx[t] = g[t] + lrelu'(x[t]) sum_k W1[k] dh[t - (k - 1) dilation]
    dW2[k] = sum_t a[t] (keep g)[t - k + 1]',           dbias2 = sum_t keep g
    dW1[k] = sum_t lrelu(x[t]) dh[t - (k - 1) dilation]',   dbias1 = sum_t dh

dh is rounded to 16 bits. Each line of the first two is a convolution with the taps turned round and
the matrices transposed. Its tile of frames t holds, up to 64 channels, all that dW and dbias of the
same line ask of those frames: the walking program of a narrow unit adds them up in registers as it
goes, and neither g nor a is read again. With more channels that sum has kernels of its own, one tap
and BLOCK_M x BLOCK_N of the matrix a program.

One partial sum a program goes to memory, and those are added in float64 in a fixed order: no
atomics, same input, same bits.

Source: gmm_jepa.ops.residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residual_unit import (
    SLOPE,
    config,
    is_narrow,
    leaky,
    load_frames,
    load_weights,
    packed,
    packs,
    processors,
    real_frames,
    row_and_first,
    store_frames,
    sum_of_products,
)


@triton.jit
def _gated(acc, gate):
    """acc times the slope of the leaky ReLU whose argument, or result, is gate."""
    return tl.where(gate.to(tl.float32) > 0, acc, SLOPE * acc)


@triton.jit(do_not_specialize=["T", "dilation", "n_tiles"])
def _residual_unit_narrow_bwd_kernel(
    g_ptr, w_ptr, gate_ptr, skip_ptr, out_ptr, dw_ptr, db_ptr, lengths_ptr, T, dilation, n_tiles,
    C: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    FIRST: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, C)
    w0 = load_weights(w_ptr, 0, offs_c, offs_c, C, True)
    w1 = load_weights(w_ptr, 1, offs_c, offs_c, C, True)
    w2 = load_weights(w_ptr, 2, offs_c, offs_c, C, True)
    dw0 = tl.zeros((C, C), dtype=tl.float32)
    dw1 = tl.zeros((C, C), dtype=tl.float32)
    dw2 = tl.zeros((C, C), dtype=tl.float32)
    db = tl.zeros((ROWS, C), dtype=tl.float32)
    masked: tl.constexpr = RAGGED and not FIRST  # dh is zero in the padding already
    # lengths come before frames
    stages: tl.constexpr = 2 * STAGES - 1 if masked and STAGES is not None else STAGES
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=stages):
        row, t0 = row_and_first(tile, T, BLOCK_T)
        frames = t0 + tl.arange(0, BLOCK_T)
        n_real = real_frames(lengths_ptr, row, T, masked)
        g0 = load_frames(g_ptr, row, frames - dilation, offs_c, n_real, T, C)
        g1 = load_frames(g_ptr, row, frames, offs_c, n_real, T, C)
        g2 = load_frames(g_ptr, row, frames + dilation, offs_c, n_real, T, C)
        gate = load_frames(gate_ptr, row, frames, offs_c, T, T, C)
        skip = load_frames(skip_ptr, row, frames, offs_c, T, T, C) if FIRST else None
        a = tl.trans(leaky(gate, PACKED) if FIRST else gate)
        dw2 = tl.dot(a, g0, dw2)
        dw1 = tl.dot(a, g1, dw1)
        dw0 = tl.dot(a, g2, dw0)
        # frames ROWS apart lie in one thread: nothing is added across threads before the end
        db += tl.sum(tl.reshape(g1.to(tl.float32), (BLOCK_T // ROWS, ROWS, C)), 0)
        acc = tl.dot(g0, w0)
        acc = tl.dot(g1, w1, acc)
        acc = _gated(tl.dot(g2, w2, acc), gate)
        if FIRST:
            acc += skip.to(tl.float32)
        elif masked:
            acc = tl.where((frames < n_real)[:, None], acc, 0.0)
        store_frames(out_ptr, acc, row, frames, offs_c, T, C)
    ptrs = dw_ptr + tl.program_id(0) * (3 * C * C) + offs_c[:, None] * C + offs_c[None, :]
    tl.store(ptrs, dw0)
    tl.store(ptrs + C * C, dw1)
    tl.store(ptrs + 2 * C * C, dw2)
    tl.store(db_ptr + tl.program_id(0) * C + offs_c, tl.sum(db, 0))


@triton.jit(do_not_specialize=["T", "dilation"])
def _residual_unit_bwd_kernel(
    g_ptr, w_ptr, gate_ptr, skip_ptr, out_ptr, db_ptr, lengths_ptr, T, dilation,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    n_channel_blocks: tl.constexpr = C // BLOCK_N
    block = tl.program_id(0) // n_channel_blocks
    row, t0 = row_and_first(block, T, BLOCK_T)
    frames = t0 + tl.arange(0, BLOCK_T)
    offs_n = tl.program_id(0) % n_channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    n_real = real_frames(lengths_ptr, row, T, RAGGED)
    acc = sum_of_products(
        g_ptr, w_ptr, row, frames, offs_n, n_real, T, dilation,
        C, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, False, True, PACKED,
    )  # fmt: skip
    acc = _gated(acc, load_frames(gate_ptr, row, frames, offs_n, T, T, C))
    if FIRST:
        acc += load_frames(skip_ptr, row, frames, offs_n, T, T, C).to(tl.float32)
    elif RAGGED:
        acc = tl.where((frames < n_real)[:, None], acc, 0.0)
    store_frames(out_ptr, acc, row, frames, offs_n, T, C)
    g = load_frames(g_ptr, row, frames, offs_n, n_real, T, C)
    tl.store(db_ptr + block.to(tl.int64) * C + offs_n, tl.sum(g.to(tl.float32), 0))


@triton.jit(do_not_specialize=["T", "dilation", "n_tiles", "n_pieces"])
def _residual_unit_bwd_weights_kernel(
    x_ptr, g_ptr, dw_ptr, lengths_ptr, T, dilation, n_tiles, n_pieces,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    n_blocks_m: tl.constexpr = C // BLOCK_M
    n_blocks_n: tl.constexpr = C // BLOCK_N
    block, piece = tl.program_id(0), tl.program_id(0) // (3 * n_blocks_m * n_blocks_n)
    offs_n = block % n_blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = block // n_blocks_n % n_blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tap = block // (n_blocks_n * n_blocks_m) % 3
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    masked: tl.constexpr = RAGGED and not FIRST  # dh is zero in the padding already
    stages: tl.constexpr = 2 * STAGES - 1 if masked else STAGES  # lengths come before frames
    for tile in tl.range(piece, n_tiles, n_pieces, num_stages=stages):
        row, t0 = row_and_first(tile, T, BLOCK_T)
        frames = t0 + tl.arange(0, BLOCK_T)
        n_real = real_frames(lengths_ptr, row, T, masked)
        x = load_frames(x_ptr, row, frames + (tap - 1) * dilation, offs_m, T, T, C)
        g = load_frames(g_ptr, row, frames, offs_n, n_real, T, C)
        dw = tl.dot(tl.trans(leaky(x, PACKED) if FIRST else x), g, dw)
    row = (piece * 3 + tap).to(tl.int64) * C + offs_m
    tl.store(dw_ptr + row[:, None] * C + offs_n[None, :], dw)


@triton.jit
def _column_sums(ptr, offs, mask, n_rows, n_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) float64 of the columns `offs` of (n_rows, n_columns)."""
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        ptrs = ptr + rows.to(tl.int64)[:, None] * n_columns + offs[None, :]
        part = tl.load(ptrs, mask=(rows < n_rows)[:, None] & mask[None, :], other=0.0)
        total += part.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["n_dw", "n_db"])
def _residual_unit_sum_kernel(
    dw_ptr, db_ptr, d_weight_ptr, d_bias_ptr, n_dw, n_db,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS_B: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """d_weight (C_out, C_in, 3) of (n_dw, 3, C_in, C_out), and d_bias (C,) of (n_db, C)."""
    n_blocks: tl.constexpr = (3 * C * C + BLOCK - 1) // BLOCK
    if tl.program_id(0) < n_blocks:
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < 3 * C * C
        total = _column_sums(dw_ptr, offs, mask, n_dw, 3 * C * C, ROWS, BLOCK)
        at = offs % C * (3 * C) + offs // C % C * 3 + offs // (C * C)
        tl.store(d_weight_ptr + at, total.to(d_weight_ptr.dtype.element_ty), mask=mask)
    else:
        offs_c = (tl.program_id(0) - n_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
        total_b = _column_sums(db_ptr, offs_c, offs_c < C, n_db, C, ROWS_B, BLOCK_B)
        tl.store(d_bias_ptr + offs_c, total_b.to(d_bias_ptr.dtype.element_ty), mask=offs_c < C)


def residual_unit_backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2, of their dtypes; dense.

    grad, x and the forward's a (B, T, C) of one dtype; those that are not dense are copied.
    """
    grad, x, a = grad.contiguous(), x.contiguous(), a.contiguous()
    d_x, d_hidden = x.new_empty(x.shape), x.new_empty(x.shape)
    gradients = [p.new_empty(p.shape) for p in (weight1, bias1, weight2, bias2)]
    if x.numel() == 0:
        return d_x, *(p.zero_() for p in gradients)
    weights = packed(weight1, weight2, x)
    lengths = None if lengths_frames is None else lengths_frames.contiguous()
    back = _narrow if is_narrow(x.shape[2]) else _wide
    back("second_bwd", grad, weights[1], a, grad, d_hidden, gradients[2:], lengths, 1)
    back("first_bwd", d_hidden, weights[0], x, grad, d_x, gradients[:2], lengths, dilation)
    return d_x, *gradients


def _narrow(
    which: str,
    g: Tensor,
    weight: Tensor,
    gate: Tensor,
    skip: Tensor,
    out: Tensor,
    gradients: list[Tensor],
    lengths: Tensor | None,
    dilation: int,
) -> None:
    """One convolution's gradients, by a kernel that walks over all tiles."""
    B, T, C = g.shape
    options = config(which, C)
    n_tiles = B * triton.cdiv(T, options["BLOCK_T"])
    n_programs = min(n_tiles, options.pop("PER_PROCESSOR") * processors(g))
    dw = g.new_empty((n_programs, 3, C, C), dtype=torch.float32)
    db = g.new_empty((n_programs, C), dtype=torch.float32)
    of_lengths = g if lengths is None else lengths
    with torch.cuda.device_of(g):
        _residual_unit_narrow_bwd_kernel[(n_programs,)](
            *(g, weight, gate, skip, out, dw, db, of_lengths, T, dilation, n_tiles),
            C=C,
            ROWS=min(options["BLOCK_T"], 256 * options["num_warps"] // C),
            FIRST=which == "first_bwd",
            RAGGED=lengths is not None,
            PACKED=packs(g.dtype),
            **options,
        )
    _add_up(dw, db, gradients)


def _wide(
    which: str,
    g: Tensor,
    weight: Tensor,
    gate: Tensor,
    skip: Tensor,
    out: Tensor,
    gradients: list[Tensor],
    lengths: Tensor | None,
    dilation: int,
) -> None:
    """One convolution's gradients: of its input, then of its weight."""
    B, T, C = g.shape
    tile, tile_of_weights = config(which, C), config("weights_bwd", C)
    options = {
        "FIRST": which == "first_bwd",
        "RAGGED": lengths is not None,
        "PACKED": packs(g.dtype),
    }
    of_lengths = g if lengths is None else lengths
    n_blocks = B * triton.cdiv(T, tile["BLOCK_T"])
    n_tiles = B * triton.cdiv(T, tile_of_weights["BLOCK_T"])
    n_matrices = 3 * C * C // (tile_of_weights["BLOCK_M"] * tile_of_weights["BLOCK_N"])
    n_pieces = max(1, min(n_tiles, 2 * processors(g) // n_matrices))
    db = g.new_empty((n_blocks, C), dtype=torch.float32)
    dw = g.new_empty((n_pieces, 3, C, C), dtype=torch.float32)
    with torch.cuda.device_of(g):
        _residual_unit_bwd_kernel[(n_blocks * (C // tile["BLOCK_N"]),)](
            *(g, weight, gate, skip, out, db, of_lengths, T, dilation), C=C, **tile, **options
        )
        _residual_unit_bwd_weights_kernel[(n_pieces * n_matrices,)](
            *(gate, g, dw, of_lengths, T, dilation, n_tiles, n_pieces),
            C=C,
            **tile_of_weights,
            **options,
        )
    _add_up(dw, db, gradients)


def _add_up(dw: Tensor, db: Tensor, gradients: list[Tensor]) -> None:
    """Partial sums (n, 3, C, C) and (n', C) to the gradients of a weight and a bias."""
    C = db.shape[1]
    # few partial sums of large matrices, many of small ones
    tile = {"ROWS": 64, "BLOCK": 64} if is_narrow(C) else {"ROWS": 16, "BLOCK": 256}
    tile |= {"ROWS_B": 128, "BLOCK_B": 32}
    grid = (triton.cdiv(3 * C * C, tile["BLOCK"]) + triton.cdiv(C, tile["BLOCK_B"]),)
    with torch.cuda.device_of(dw):
        _residual_unit_sum_kernel[grid](dw, db, *gradients, len(dw), len(db), C=C, **tile)
