"""Log-mel frames at n_fft beyond 510, where `log_mel.py` cannot keep its operands: one kernel.

    y_tn = window_n x_b[hop t - N/2 + n],  n = 0..N-1, reflected at both ends of row b's own length
    X_tk = sum_n y_tn exp(-2 pi i k n / N),  mel = |X|^2 @ filters,  out = log(mel + floor)

Arguments and results as there. `log_mel.log_mel` calls this one. More than 128 mels are split over
programs, which then repeat the transform.

The transform is a matrix product, folded twice. A real signal: with e_n = y_n + y_{N-n} and
o_n = y_n - y_{N-n}, n = 0..N/2, Re X = sum_n e_n cos(2 pi k n / N) and Im X = -sum_n o_n sin(.).
That halves the work. Bins k and N/2 - k share their products: cos(2 pi (N/2-k) n / N) is
(-1)^n cos(2 pi k n / N), and likewise sin with the opposite sign. So with the sums over even and
odd n apart (A, B of the cosines, C, D of the sines),

    |X_k|^2       = (A + B)^2 + (C + D)^2
    |X_{N/2-k}|^2 = (A - B)^2 + (C - D)^2,    k = 0..N/4,

which halves it again.

Precision: y is scaled by a power of two for each frame and, like the cosines, split into two
float16 of 11 bits; three products of the parts give 22 bits, those of tf32x3, at twice its rate.
Powers differ by more than float16 holds within one frame, so the mel product is tf32x3 itself.

On one H200 this kernel passed every case of tests/kernels/test_log_mel.py, n_fft 400 to 1,024, as
the only log-mel kernel of commit 4048c76. There 24,032 frames of n_fft 400 took 0.767 ms; larger
n_fft was not timed.

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

MAX_MELS = 128  # mels of one program
SAMPLES_A_STEP = 64  # of the search for a frame's largest sample


@triton.jit
def _windowed(x_ptrs, stride_x_s, start, length, window_ptr, offs_n, N_FFT: tl.constexpr):
    """y of a tile: (BLOCK_T, BLOCK_N) float32; 0 for n outside 0..N-1 and beyond reflection."""
    inside = (offs_n >= 0) & (offs_n < N_FFT)
    window = tl.load(window_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    position = start[:, None] + offs_n[None, :]
    last = (length - 1)[:, None]
    mirrored = tl.where(position < 0, -position, tl.minimum(position, 2 * last - position))
    mask = (mirrored >= 0) & (mirrored <= last) & inside[None, :]
    x = tl.load(x_ptrs[:, None] + mirrored.to(tl.int64) * stride_x_s, mask=mask, other=0)
    y = x.to(tl.float32)
    if x_ptrs.dtype.element_ty == tl.int16:
        y *= 1.0 / 32768.0
    return y * window[None, :]


@triton.jit
def power_of_two_below(largest):
    """2^(e-8) where 2^e <= largest < 2^(e+1), and its inverse; both normal numbers."""
    exponent = tl.minimum(tl.maximum(largest, 7.9e-31), 1.2e30).to(tl.int32, bitcast=True)
    exponent = (exponent & 0x7F800000) - (8 << 23)
    inverse = (254 << 23) - exponent
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _dot_float16(a, b_ptrs, low_part, total):
    """total + a @ b to 22 bits: a (T, N) float32, b's high and low float16 parts in memory."""
    high = a.to(tl.float16)
    low = (a - high.to(tl.float32)).to(tl.float16)
    b_high = tl.load(b_ptrs)
    b_low = tl.load(b_ptrs + low_part)
    total = tl.dot(low, b_high, total)
    total = tl.dot(high, b_low, total)
    return tl.dot(high, b_high, total)


@triton.jit(do_not_specialize=["n_frames", "T", "hop"])
def _log_mel_large_fwd_kernel(
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
    N_PAD: tl.constexpr,  # rows of each of the four tables
    F_PAD: tl.constexpr,  # their columns, bin pairs
    WIDE: tl.constexpr,  # a row of 2^30 samples or more
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = offs_t < n_frames
    row = offs_t // T
    start = (offs_t - row * T) * hop  # first right of the frame's centre, then of the frame
    length = tl.load(lengths_ptr + row, mask=mask_t, other=0)
    valid = (length > 0) & (start <= length)
    length = tl.where(valid, length, 0)
    start -= N_FFT // 2
    out_ptrs = out_ptr + offs_t[:, None] * N_MELS + offs_m[None, :]
    mask_out = mask_t[:, None] & (offs_m < N_MELS)[None, :]
    if tl.max(length, 0) == 0:
        nothing = tl.zeros((BLOCK_T, BLOCK_M), dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptrs, nothing, mask=mask_out)
        return
    if not WIDE:
        start, length = start.to(tl.int32), length.to(tl.int32)
    x_ptrs = x_ptr + row * stride_x_b

    largest = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for n0 in range(0, N_FFT, BLOCK_S):
        offs_n = n0 + tl.arange(0, BLOCK_S)
        y = _windowed(x_ptrs, stride_x_s, start, length, window_ptr, offs_n, N_FFT)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
    scale, inverse_scale = power_of_two_below(largest)

    TABLE: tl.constexpr = N_PAD * F_PAD
    mel = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    # hoisting addresses out of the loops costs more registers than it saves instructions:
    # 548 bytes of spills against 160 at BLOCK_F 64
    for f0 in tl.range(0, F_PAD, BLOCK_F, disable_licm=True):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        cos_even = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        cos_odd = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        sin_even = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        sin_odd = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        for n0 in tl.range(0, N_PAD, BLOCK_N, disable_licm=True):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            b_ptrs = basis_ptr + offs_n[:, None] * F_PAD + offs_f[None, :]
            n = 2 * offs_n  # (BLOCK_N,), past N/2 the tables are 0
            y = _windowed(x_ptrs, stride_x_s, start, length, window_ptr, n, N_FFT)
            y_end = _windowed(x_ptrs, stride_x_s, start, length, window_ptr, N_FFT - n, N_FFT)
            y, y_end = y * inverse_scale[:, None], y_end * inverse_scale[:, None]
            cos_even = _dot_float16(y + y_end, b_ptrs, 4 * TABLE, cos_even)
            sin_even = _dot_float16(y - y_end, b_ptrs + 2 * TABLE, 4 * TABLE, sin_even)
            n = 2 * offs_n + 1
            y = _windowed(x_ptrs, stride_x_s, start, length, window_ptr, n, N_FFT)
            y_end = _windowed(x_ptrs, stride_x_s, start, length, window_ptr, N_FFT - n, N_FFT)
            y, y_end = y * inverse_scale[:, None], y_end * inverse_scale[:, None]
            cos_odd = _dot_float16(y + y_end, b_ptrs + TABLE, 4 * TABLE, cos_odd)
            sin_odd = _dot_float16(y - y_end, b_ptrs + 3 * TABLE, 4 * TABLE, sin_odd)
        re, im = cos_even + cos_odd, sin_even + sin_odd  # bin k
        mask_m = (offs_m < N_MELS)[None, :]
        k = offs_f[:, None]
        mask = mask_m & (k <= N_FFT // 4)
        filters_ptrs = filters_ptr + k * N_MELS + offs_m[None, :]
        filters = tl.load(filters_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_F, BLOCK_M)
        mel = tl.dot(re * re + im * im, filters, mel, input_precision="tf32x3")
        re, im = cos_even - cos_odd, sin_even - sin_odd  # bin N/2 - k, unless that is k itself
        k = N_FFT // 2 - k
        mask = mask_m & (k > N_FFT // 4)
        filters_ptrs = filters_ptr + k * N_MELS + offs_m[None, :]
        filters = tl.load(filters_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_F, BLOCK_M)
        mel = tl.dot(re * re + im * im, filters, mel, input_precision="tf32x3")

    out = tl.log(mel * scale[:, None] * scale[:, None] + floor)
    out = tl.where(valid[:, None], out, 0.0)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_out)


def config(n_mels: int) -> dict[str, int]:
    """Tile and schedule: of those that compile for sm_90 without spills, the widest in BLOCK_F.

    At the paper's shape BLOCK_F 32 needs 252 registers; 64 spills 160 bytes and 128 spills 728
    (2 stages); BLOCK_T 128 with BLOCK_F 32 spills 456.
    """
    block_m = max(16, min(MAX_MELS, triton.next_power_of_2(n_mels)))
    tile = {"BLOCK_T": 64, "BLOCK_N": 16, "BLOCK_F": 32, "BLOCK_M": block_m}
    return {**tile, "BLOCK_S": SAMPLES_A_STEP, "num_warps": 8, "num_stages": 3}


def table_shape(n_fft: int, tile: dict[str, int]) -> tuple[int, int]:
    """(N_PAD, F_PAD): n_fft // 4 + 1 rows and columns, padded to whole blocks."""
    size = n_fft // 4 + 1
    n_blocks, f_blocks = triton.cdiv(size, tile["BLOCK_N"]), triton.cdiv(size, tile["BLOCK_F"])
    return n_blocks * tile["BLOCK_N"], f_blocks * tile["BLOCK_F"]


@functools.lru_cache(maxsize=16)
def basis(n_fft: int, n_pad: int, f_pad: int, device: torch.device) -> Tensor:
    """(2, 4, n_pad, f_pad) float16: high and low parts of the folded transform's tables.

    Tables: cosines at n = 2 j, cosines at n = 2 j + 1, sines at n = 2 j, sines at n = 2 j + 1;
    row j, column k. Zero where n > n_fft / 2 or k > n_fft / 4. The term n = n_fft / 2, which the
    fold counts twice, is halved.
    """
    j = torch.arange(n_pad)
    n = torch.stack((2 * j, 2 * j + 1))[:, :, None]  # (2, n_pad, 1)
    k = torch.arange(f_pad)
    angle = (2.0 * math.pi / n_fft) * ((n * k) % n_fft).double()
    tables = torch.cat((angle.cos(), angle.sin()))
    weight = (n < n_fft // 2).double() + 0.5 * (n == n_fft // 2)
    tables *= (weight * (k <= n_fft // 4)).repeat(2, 1, 1)
    high = tables.half()
    return torch.stack((high, (tables - high.double()).half())).to(device)


def log_mel_large(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    *,
    hop: int,
    floor: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `log_mel.log_mel`: waveform (B, S) -> (B, S // hop + 1, n_mels).

    The tables of a transform size are made once for each device and kept.
    """
    (B, S), n_fft, n_mels = waveform.shape, window.shape[0], filters.shape[1]
    T = S // hop + 1
    out = waveform.new_empty((B, T, n_mels), dtype=out_dtype)
    if not out.numel():
        return out
    tile = config(n_mels)
    n_pad, f_pad = table_shape(n_fft, tile)
    tables = basis(n_fft, n_pad, f_pad, waveform.device)
    grid = (triton.cdiv(B * T, tile["BLOCK_T"]), triton.cdiv(n_mels, tile["BLOCK_M"]))
    with torch.cuda.device_of(waveform):
        _log_mel_large_fwd_kernel[grid](
            waveform,
            lengths_samples.contiguous(),
            window.contiguous(),
            tables,
            filters.contiguous(),
            out,
            B * T,
            T,
            hop,
            floor,
            *waveform.stride(),
            N_FFT=n_fft,
            N_MELS=n_mels,
            N_PAD=n_pad,
            F_PAD=f_pad,
            WIDE=S >= 1 << 30,
            **tile,
        )
    return out
