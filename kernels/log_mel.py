"""Log-mel frames of a padded batch of waveforms, in one kernel.

    y_tn = window_n x_b[hop t - N/2 + n],  n = 0..N-1, reflected at both ends of row b's own length
    X_tk = sum_n y_tn exp(-2 pi i k n / N),  mel = |X|^2 @ filters,  out = log(mel + floor)

waveform (B, S) float32, bf16, float16 or int16 (divided by 32,768), any strides; lengths (B,)
int64; out (B, T, n_mels) float32, bf16 or float16, frames past a row's valid ones 0. N is even.
Frames of all rows form one list, of which a program takes BLOCK_T; nothing but waveform, tables and
output touches memory. More than 128 mels are split over programs, which then repeat the transform.
N beyond 510 is left to `log_mel_large.py`.

The transform is a matrix product, folded twice. A real signal: with e_n = y_n + y_{N-n} and
o_n = y_n - y_{N-n}, n = 0..N/2, Re X = sum_n e_n cos(2 pi k n / N) and Im X = -sum_n o_n sin(.).
That halves the work. Samples n and N/2 - n share their tables: cos(2 pi k (N/2-n) / N) is
(-1)^k cos(2 pi k n / N), and likewise sin with the opposite sign. So, n = 0..N/4,

    Re X_k = sum_n (e_n + e_{N/2-n}) cos,   Im X_k = -sum_n (o_n - o_{N/2-n}) sin,   k even,
    Re X_k = sum_n (e_n - e_{N/2-n}) cos,   Im X_k = -sum_n (o_n + o_{N/2-n}) sin,   k odd,

which halves it again: 81 k operations a frame at N = 400 (161 k folded once). Even and odd bins
are two passes over the samples; the folded samples of a pass stay in shared memory for all bins.

Precision: y is scaled by a power of two for each frame and, like the tables, split into two
float16 of 11 bits; three products of the parts give 22 bits, those of tf32x3, at twice its rate.
Powers differ by more than float16 holds within one frame, but none is negative: split into two
bfloat16, as the filters are, they give mel energies to 16 bits.

Source: gmm_jepa.ops.log_mel, torchaudio's MelSpectrogram(center, reflect, power 2); the split is
that of Ootomo and Yokota, arXiv 2203.03341.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .log_mel_large import MAX_MELS, SAMPLES_A_STEP, log_mel_large, power_of_two_below

SIZE = 128  # rows and columns of a table of the transform: n = 0..N/4, every second bin
MAX_N_FFT = 4 * SIZE - 2  # even, N/4 < SIZE


@triton.jit
def _windowed(
    x_ptr, stride_x_s, row_start, start, length, window_ptr, offs_n, weighted, WHOLE: tl.constexpr
):
    """y at offs_n of each frame: (BLOCK_T, BLOCK_N) float32; 0 beyond reflection.

    offs_n (BLOCK_N,) lies in the frame; samples that are not `weighted` count 0. Nothing is
    reflected where the tile is WHOLE. The hints of contiguity hold for some offs_n only: they lay
    the threads of a warp along n, and widen no load, since no frame's address is known aligned.
    """
    weight = tl.load(window_ptr + offs_n, mask=weighted, other=0.0).to(tl.float32)
    if x_ptr.dtype.element_ty == tl.int16:
        weight *= 1.0 / 32768.0
    if WHOLE:
        first = row_start + start.to(tl.int64) * stride_x_s
        offsets = first[:, None] + (offs_n.to(tl.int64) * stride_x_s)[None, :]
        x = tl.load(x_ptr + tl.max_contiguous(offsets, [1, 2]))
    else:
        position = start[:, None] + offs_n[None, :]
        last = (length - 1)[:, None]
        mirrored = tl.where(position < 0, -position, tl.minimum(position, 2 * last - position))
        mask = (mirrored >= 0) & (mirrored <= last)
        offsets = row_start[:, None] + mirrored.to(tl.int64) * stride_x_s
        offsets = tl.max_contiguous(offsets, [1, 2])
        x = tl.load(x_ptr + offsets, mask=mask, other=0)
    return x.to(tl.float32) * weight[None, :]


@triton.jit
def _split(a):
    """High and low float16 parts of a float32 tile."""
    high = a.to(tl.float16)
    return high, (a - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _dot(high, low, high_2, low_2, b_ptrs, b_ptrs_2, low_part, total):
    """total + [a, a_2] @ [b, b_2]: small products first, since tensor cores cut their sums off."""
    b_high, b_high_2 = tl.load(b_ptrs), tl.load(b_ptrs_2)
    total = tl.dot(low, b_high, total)
    total = tl.dot(low_2, b_high_2, total)
    total = tl.dot(high, tl.load(b_ptrs + low_part), total)
    total = tl.dot(high_2, tl.load(b_ptrs_2 + low_part), total)
    total = tl.dot(high_2, b_high_2, total)
    return tl.dot(high, b_high, total)


@triton.jit
def _dot_bfloat16(high, low, b_ptrs, mask, total):
    """total + (high + low) @ b to 16 bits where nothing is negative; b (F, M) in memory."""
    b = tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
    b_high = b.to(tl.bfloat16)
    b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(low, b_high, total)
    total = tl.dot(high, b_low, total)
    return tl.dot(high, b_high, total)


@triton.jit
def _largest(
    x_ptr,
    stride_x_s,
    row_start,
    start,
    length,
    window_ptr,
    N_FFT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """max_n |y_tn|: (BLOCK_T,). Up to eight steps at once, to have their loads in flight."""
    STEPS: tl.constexpr = min(8, (N_FFT + BLOCK_S - 1) // BLOCK_S) if WHOLE else 1
    largest = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.float32)
    for n0 in range(0, N_FFT, STEPS * BLOCK_S):
        for step in tl.static_range(STEPS):
            n = n0 + step * BLOCK_S + tl.arange(0, BLOCK_S)
            weighted = n < N_FFT
            n = tl.minimum(n, N_FFT - 1)
            y = _windowed(
                x_ptr, stride_x_s, row_start, start, length, window_ptr, n, weighted, WHOLE
            )
            largest = tl.maximum(largest, tl.abs(y))
    return tl.max(largest, 1)


@triton.jit
def _four(
    x_ptr,
    stride_x_s,
    row_start,
    start,
    length,
    window_ptr,
    offs_n,
    N_FFT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y at n, N - n, N/2 - n and N/2 + n: (BLOCK_T, BLOCK_N) each."""
    n = tl.minimum(offs_n, N_FFT // 4)  # behind it the tables are 0
    end = N_FFT - tl.maximum(n, 1)
    left, right = N_FFT // 2 - n, N_FFT // 2 + n
    once, paired = offs_n >= 0, offs_n > 0  # N - 0 is no sample, N/2 but one
    y = _windowed(x_ptr, stride_x_s, row_start, start, length, window_ptr, n, once, WHOLE)
    y_end = _windowed(x_ptr, stride_x_s, row_start, start, length, window_ptr, end, paired, WHOLE)
    y_left = _windowed(x_ptr, stride_x_s, row_start, start, length, window_ptr, left, once, WHOLE)
    y_right = _windowed(
        x_ptr, stride_x_s, row_start, start, length, window_ptr, right, paired, WHOLE
    )
    return y, y_end, y_left, y_right


@triton.jit
def _folded(
    x_ptr,
    stride_x_s,
    row_start,
    start,
    length,
    whole,
    window_ptr,
    inverse_scale,
    offs_n,
    ODD: tl.constexpr,
    N_FFT: tl.constexpr,
):
    """Operands of the even or odd bins: parts of both folds, four (BLOCK_T, BLOCK_N) float16."""
    if whole:
        y, y_end, y_left, y_right = _four(
            x_ptr, stride_x_s, row_start, start, length, window_ptr, offs_n, N_FFT, True
        )
    else:
        y, y_end, y_left, y_right = _four(
            x_ptr, stride_x_s, row_start, start, length, window_ptr, offs_n, N_FFT, False
        )
    if ODD:
        e = (y + y_end) - (y_left + y_right)
        o = (y - y_end) + (y_left - y_right)
    else:
        e = (y + y_end) + (y_left + y_right)
        o = (y - y_end) - (y_left - y_right)
    e_high, e_low = _split(e * inverse_scale[:, None])
    o_high, o_low = _split(o * inverse_scale[:, None])
    return e_high, e_low, o_high, o_low


@triton.jit
def _store(out_ptr, offs_t, mask_t, valid, offs_m, mel, scale, floor, N_MELS: tl.constexpr):
    out = tl.log(mel * scale[:, None] * scale[:, None] + floor)
    out = tl.where(valid[:, None], out, 0.0)
    out_ptrs = out_ptr + offs_t[:, None] * N_MELS + offs_m[None, :]
    mask = mask_t[:, None] & (offs_m < N_MELS)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_frames", "T", "hop"])
def _log_mel_fwd_kernel(
    x_ptr,
    lengths_ptr,
    window_ptr,
    basis_ptr,
    filters_ptr,
    out_ptr,
    n_frames,  # B T
    T,
    hop,
    floor,
    stride_x_b,
    stride_x_s,
    N_FFT: tl.constexpr,
    N_MELS: tl.constexpr,
    SIZE: tl.constexpr,  # rows of each of the four tables, and columns, every second bin
    WIDE: tl.constexpr,  # a row of 2^30 samples or more
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_M_MORE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_m = tl.program_id(1) * (BLOCK_M + BLOCK_M_MORE) + tl.arange(0, BLOCK_M)
    offs_more = tl.program_id(1) * (BLOCK_M + BLOCK_M_MORE) + BLOCK_M
    offs_more += tl.arange(0, max(1, BLOCK_M_MORE))
    mask_t = offs_t < n_frames
    row = offs_t // T
    start = (offs_t - row * T) * hop  # first right of the frame's centre, then of the frame
    length = tl.load(lengths_ptr + row, mask=mask_t, other=0)
    valid = (length > 0) & (start <= length)
    length = tl.where(valid, length, 0)
    start -= N_FFT // 2
    mel = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    mel_more = tl.zeros((BLOCK_T, max(1, BLOCK_M_MORE)), dtype=tl.float32)
    if tl.max(length, 0) == 0:
        _store(out_ptr, offs_t, mask_t, valid, offs_m, mel, length, floor, N_MELS)
        if BLOCK_M_MORE > 0:
            _store(out_ptr, offs_t, mask_t, valid, offs_more, mel_more, length, floor, N_MELS)
        return
    row_start = row * stride_x_b
    inside = (start >= 0) & (start + N_FFT <= length)
    whole = tl.min(inside.to(tl.int32), 0) == 1
    if not WIDE:
        start, length = start.to(tl.int32), length.to(tl.int32)

    if whole:
        largest = _largest(
            x_ptr, stride_x_s, row_start, start, length, window_ptr, N_FFT, BLOCK_T, BLOCK_S, True
        )
    else:
        largest = _largest(
            x_ptr, stride_x_s, row_start, start, length, window_ptr, N_FFT, BLOCK_T, BLOCK_S, False
        )
    scale, inverse_scale = power_of_two_below(largest)
    TABLE: tl.constexpr = SIZE * SIZE
    BLOCK_N: tl.constexpr = SIZE // 2  # two tiles hold the samples of all products
    HALF: tl.constexpr = N_FFT // 2
    for odd in tl.static_range(2):
        table = basis_ptr + 2 * odd * TABLE
        offs_n = tl.arange(0, BLOCK_N)
        e_high, e_low, o_high, o_low = _folded(
            x_ptr,
            stride_x_s,
            row_start,
            start,
            length,
            whole,
            window_ptr,
            inverse_scale,
            offs_n,
            odd,
            N_FFT,
        )
        e_high_2, e_low_2, o_high_2, o_low_2 = _folded(
            x_ptr,
            stride_x_s,
            row_start,
            start,
            length,
            whole,
            window_ptr,
            inverse_scale,
            BLOCK_N + offs_n,
            odd,
            N_FFT,
        )
        for f0 in tl.range(0, SIZE, BLOCK_F, disable_licm=True):
            offs_f = f0 + tl.arange(0, BLOCK_F)
            re = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
            im = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
            b = table + offs_n[:, None] * SIZE + offs_f[None, :]
            b_2 = b + BLOCK_N * SIZE
            re = _dot(e_high, e_low, e_high_2, e_low_2, b, b_2, 4 * TABLE, re)
            b, b_2 = b + TABLE, b_2 + TABLE
            im = _dot(o_high, o_low, o_high_2, o_low_2, b, b_2, 4 * TABLE, im)
            power = re * re + im * im
            high = power.to(tl.bfloat16)
            low = (power - high.to(tl.float32)).to(tl.bfloat16)
            k = (2 * offs_f + odd)[:, None]
            b_ptrs = filters_ptr + k * N_MELS
            mask = (k <= HALF) & (offs_m < N_MELS)[None, :]
            mel = _dot_bfloat16(high, low, b_ptrs + offs_m[None, :], mask, mel)
            if BLOCK_M_MORE > 0:
                mask = (k <= HALF) & (offs_more < N_MELS)[None, :]
                mel_more = _dot_bfloat16(high, low, b_ptrs + offs_more[None, :], mask, mel_more)
    _store(out_ptr, offs_t, mask_t, valid, offs_m, mel, scale, floor, N_MELS)
    if BLOCK_M_MORE > 0:
        _store(out_ptr, offs_t, mask_t, valid, offs_more, mel_more, scale, floor, N_MELS)


def config(n_mels: int) -> dict[str, int]:
    """Tile and schedule: only such as ran on one H200 (n_fft 400) and were right.

    There, ms for 24,032 and for 384,256 frames: this tile 0.196 and 2.47; two stages 0.226 and
    2.66; three programs a multiprocessor (168 registers) 0.233 and 2.83; BLOCK_T 128 with eight
    warps 0.215 and 2.52, with two stages too 0.191 and 2.25, in 210 KB of shared memory, so not
    used; BLOCK_M 128 for 80 mels 0.323 and 3.91. BLOCK_F 64 gave NaN, for a reason not found: its
    PTX is right where it is emulated (kernels/README.md). So run a tile on a GPU before use. For
    that reason, too, smaller n_fft have the tables of 510: the loops over blocks stay the same.

    BLOCK_F differs from BLOCK_T, since Triton lays out loads of one shape alike, and would give a
    thread eight samples in a row, as of the float16 tables. Four warps, since a product of 64 rows
    is one warp group's: of eight, both groups would make all of it, as Triton keeps chained
    products within a group.
    """
    block_m, more = (64, 16) if n_mels <= 80 else (MAX_MELS, 0)
    tile = {"BLOCK_T": 64, "BLOCK_F": 32, "BLOCK_M": block_m, "BLOCK_M_MORE": more}
    return {**tile, "BLOCK_S": SAMPLES_A_STEP, "num_warps": 4, "num_stages": 1}


@functools.lru_cache(maxsize=16)
def basis(n_fft: int, device: torch.device) -> Tensor:
    """(2, 4, SIZE, SIZE) float16: high and low parts of the folded transform's tables.

    Tables: cosines and sines of bins k = 2 i, cosines and sines of bins k = 2 i + 1; row n,
    column i. Zero where n > n_fft / 4 or k > n_fft / 2. The term n = n_fft / 4, which the fold
    counts twice, is halved.
    """
    n = torch.arange(SIZE)[:, None]
    k = 2 * torch.arange(SIZE) + torch.arange(2)[:, None, None]  # (2, 1, SIZE)
    angle = (2.0 * math.pi / n_fft) * ((n * k) % n_fft).double()
    weight = (4 * n < n_fft).double() + 0.5 * (4 * n == n_fft)
    tables = torch.stack((angle.cos(), angle.sin()), 1) * (weight * (k <= n_fft // 2))[:, None]
    tables = tables.flatten(0, 1)
    high = tables.half()
    return torch.stack((high, (tables - high.double()).half())).to(device)


def log_mel(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    *,
    hop: int,
    floor: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `gmm_jepa.ops.log_mel`: waveform (B, S) -> (B, S // hop + 1, n_mels).

    The tables of a transform size are made once for each device and kept.
    """
    (B, S), n_fft, n_mels = waveform.shape, window.shape[0], filters.shape[1]
    if n_fft > MAX_N_FFT:
        options = {"hop": hop, "floor": floor, "out_dtype": out_dtype}
        return log_mel_large(waveform, lengths_samples, window, filters, **options)
    T = S // hop + 1
    out = waveform.new_empty((B, T, n_mels), dtype=out_dtype)
    if not out.numel():
        return out
    tile = config(n_mels)
    mels = tile["BLOCK_M"] + tile["BLOCK_M_MORE"]
    grid = (triton.cdiv(B * T, tile["BLOCK_T"]), triton.cdiv(n_mels, mels))
    with torch.cuda.device_of(waveform):
        _log_mel_fwd_kernel[grid](
            waveform,
            lengths_samples.contiguous(),
            window.contiguous(),
            basis(n_fft, waveform.device),
            filters.contiguous(),
            out,
            B * T,
            T,
            hop,
            floor,
            *waveform.stride(),
            N_FFT=n_fft,
            N_MELS=n_mels,
            SIZE=SIZE,
            WIDE=S >= 1 << 30,
            **tile,
        )
    return out
