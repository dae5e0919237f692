"""A residual unit of two convolutions of three taps, frame-major, 16 bits; its gradients next door.

    a[t] = keep lrelu(bias1 + sum_k W1[k]' lrelu(x[t + (k - 1) dilation]))
    y[t] = x[t] + keep (bias2 + sum_k W2[k]' a[t + k - 1]),   x and a zero beyond a row's ends

x, a, y (B, T, C) bf16 or float16, dense; weights (C, C, 3) and biases (C,) of any float type; keep
is one on a row's real frames. Products are of 16 bits, sums float32; a and y are rounded once.
Between the two kernels goes a and not what the first convolution made: the second multiplies it as
it is, and its sign is all that the gradients ask about the other.

A program holds BLOCK_T frames of BLOCK_N channels in float32 and adds products of a tap's frames
and BLOCK_K channels; what comes before and after a convolution is done in registers. Up to 64
channels the weights of all taps stay in shared memory, and the program walks over tiles.

Source: gmm_jepa.ops.residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOPE = tl.constexpr(0.1)
MOST_RESIDENT = 64
"""Channels up to which a program keeps the weights of all taps."""
PROCESSORS = 132
"""Multiprocessors to launch for where there is no device."""
SCHEDULE = "several"
"""How the programs of a narrow unit load their tiles, a key of `SCHEDULES`; not measured yet."""
SCHEDULES = {
    # A tile is asked for when the one before is done: what hides the wait is other programs.
    "several": {
        "first": {"STAGES": None, "num_stages": 2, "PER_PROCESSOR": 4},
        "second": {"STAGES": None, "num_stages": 2, "PER_PROCESSOR": 2},
        "second_bwd": {"STAGES": 2, "PER_PROCESSOR": 2},
        "first_bwd": {"STAGES": 2, "PER_PROCESSOR": 2},
    },
    # A tile is asked for a turn ahead, and has memory of its own. "first_bwd" spills 52 bytes.
    "ahead": {
        "first": {"STAGES": None, "num_stages": 3, "PER_PROCESSOR": 2},
        "second": {"STAGES": None, "num_stages": 3, "PER_PROCESSOR": 2},
        "second_bwd": {"STAGES": 3, "PER_PROCESSOR": 2},
        "first_bwd": {"STAGES": None, "num_stages": 3, "PER_PROCESSOR": 2},
    },
    # Through registers and L1, where taps find what the one before has loaded; others go past it.
    "direct": {
        "first": {"STAGES": 1, "PER_PROCESSOR": 3},
        "second": {"STAGES": 1, "PER_PROCESSOR": 4},
        "second_bwd": {"STAGES": 1, "PER_PROCESSOR": 2},
        "first_bwd": {"STAGES": 1, "PER_PROCESSOR": 2},
    },
}
"""PER_PROCESSOR programs walk over the tiles: as many as shared memory (228 KB, each program's and
1 KB more) and registers hold at 64 channels, ragged or not, as compiled for sm_90. STAGES of None:
`num_stages` of the launch, which leaves lengths and what is added last out of the pipeline."""


@triton.jit
def leaky(x, PACKED: tl.constexpr):
    """Leaky ReLU of a 16-bit tile; PACKED: two values an instruction, and no float32.

    The slope is in two parts, so that the product is rounded as that by 0.1: 12 instructions for 8
    values and not 27. The interpreter lacks arithmetic of bf16 and takes the plain form.
    """
    if not PACKED:
        wide = x.to(tl.float32)
        return tl.maximum(wide, SLOPE * wide).to(x.dtype)
    upper = 0.10009765625 if x.dtype == tl.bfloat16 else 0.0999755859375
    small = x * tl.full(x.shape, SLOPE - upper, x.dtype)
    return tl.maximum(x, tl.fma(x, tl.full(x.shape, upper, x.dtype), small)).to(x.dtype)


@triton.jit
def row_and_first(tile, T, BLOCK_T: tl.constexpr):
    """Batch row and first frame of a tile; tiles of one row are neighbours."""
    n_blocks = tl.cdiv(T, BLOCK_T)
    return tile // n_blocks, tile % n_blocks * BLOCK_T


@triton.jit
def real_frames(lengths_ptr, row, T, RAGGED: tl.constexpr):
    """Number of a row's real frames, or T."""
    return tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), T) if RAGGED else T


@triton.jit
def load_frames(ptr, row, frames, offs_c, n_frames, T, C: tl.constexpr):
    """(BLOCK_T, BLOCK_C) of a batch row, zero for frames outside 0 .. n_frames - 1."""
    mask = (frames >= 0) & (frames < n_frames)
    ptrs = ptr + row.to(tl.int64) * T * C + frames[:, None] * C + offs_c[None, :]
    return tl.load(ptrs, mask=mask[:, None], other=0.0)


@triton.jit
def store_frames(ptr, values, row, frames, offs_c, T, C: tl.constexpr):
    """Store (BLOCK_T, BLOCK_C) in a batch row, in its dtype."""
    ptrs = ptr + row.to(tl.int64) * T * C + frames[:, None] * C + offs_c[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=(frames < T)[:, None])


@triton.jit
def load_weights(w_ptr, tap, offs_k, offs_n, C: tl.constexpr, TURNED: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of W[tap] (3, C_in, C_out); TURNED: of W[2 - tap] transposed."""
    if TURNED:
        return tl.load(w_ptr + (2 - tap) * C * C + offs_n[None, :] * C + offs_k[:, None])
    return tl.load(w_ptr + tap * C * C + offs_k[:, None] * C + offs_n[None, :])


@triton.jit
def sum_of_products(
    x_ptr, w_ptr, row, frames, offs_n, n_frames, T, dilation,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, LEAKY: tl.constexpr, TURNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_T, BLOCK_N) float32: the convolution of x or of its leaky ReLU, without a bias."""
    n_blocks: tl.constexpr = C // BLOCK_K
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for i in tl.range(3 * n_blocks, num_stages=STAGES):
        tap = i // n_blocks
        offs_k = i % n_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_frames(x_ptr, row, frames + (tap - 1) * dilation, offs_k, n_frames, T, C)
        w = load_weights(w_ptr, tap, offs_k, offs_n, C, TURNED)
        acc = tl.dot(leaky(x, PACKED) if LEAKY else x, w, acc)
    return acc


@triton.jit
def _finish(
    acc, bias, skip, frames, n_real, FIRST: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """What follows the products: lrelu and zeros in the padding, or zeros there and the sum."""
    acc += bias[None, :]
    if FIRST:
        acc = tl.maximum(acc, SLOPE * acc)
    if RAGGED:
        acc = tl.where((frames < n_real)[:, None], acc, 0.0)
    return acc if FIRST else acc + skip.to(tl.float32)


@triton.jit(do_not_specialize=["T", "dilation", "n_tiles"])
def _residual_unit_narrow_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, skip_ptr, out_ptr, lengths_ptr, T, dilation, n_tiles,
    C: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    offs_c = tl.arange(0, C)
    w0 = load_weights(w_ptr, 0, offs_c, offs_c, C, False)
    w1 = load_weights(w_ptr, 1, offs_c, offs_c, C, False)
    w2 = load_weights(w_ptr, 2, offs_c, offs_c, C, False)
    bias = tl.load(bias_ptr + offs_c).to(tl.float32)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        row, t0 = row_and_first(tile, T, BLOCK_T)
        frames = t0 + tl.arange(0, BLOCK_T)
        n_real = real_frames(lengths_ptr, row, T, RAGGED)
        skip = load_frames(skip_ptr, row, frames, offs_c, T, T, C) if not FIRST else None
        x0 = load_frames(x_ptr, row, frames - dilation, offs_c, T, T, C)
        x1 = load_frames(x_ptr, row, frames, offs_c, T, T, C)
        x2 = load_frames(x_ptr, row, frames + dilation, offs_c, T, T, C)
        acc = tl.dot(leaky(x0, PACKED) if FIRST else x0, w0)
        acc = tl.dot(leaky(x1, PACKED) if FIRST else x1, w1, acc)
        acc = tl.dot(leaky(x2, PACKED) if FIRST else x2, w2, acc)
        acc = _finish(acc, bias, skip, frames, n_real, FIRST, RAGGED)
        store_frames(out_ptr, acc, row, frames, offs_c, T, C)


@triton.jit(do_not_specialize=["T", "dilation"])
def _residual_unit_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, skip_ptr, out_ptr, lengths_ptr, T, dilation,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    n_channel_blocks: tl.constexpr = C // BLOCK_N
    row, t0 = row_and_first(tl.program_id(0) // n_channel_blocks, T, BLOCK_T)
    frames = t0 + tl.arange(0, BLOCK_T)
    offs_n = tl.program_id(0) % n_channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = sum_of_products(
        x_ptr, w_ptr, row, frames, offs_n, T, T, dilation,
        C, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, FIRST, False, PACKED,
    )  # fmt: skip
    n_real = real_frames(lengths_ptr, row, T, RAGGED)
    bias = tl.load(bias_ptr + offs_n).to(tl.float32)
    skip = load_frames(skip_ptr, row, frames, offs_n, T, T, C) if not FIRST else None
    acc = _finish(acc, bias, skip, frames, n_real, FIRST, RAGGED)
    store_frames(out_ptr, acc, row, frames, offs_n, T, C)


@triton.jit
def _residual_unit_pack_kernel(
    weight1_ptr, weight2_ptr, out_ptr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Both weights (C_out, C_in, 3) as (2, 3, C_in, C_out) in out's dtype."""
    n_blocks: tl.constexpr = (3 * C * C + BLOCK - 1) // BLOCK
    offs = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    tap, c_in, c_out = offs // (C * C), offs // C % C, offs % C
    at, mask = c_out * 3 * C + c_in * 3 + tap, offs < 3 * C * C
    if tl.program_id(0) < n_blocks:
        w = tl.load(weight1_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + offs, w.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        w = tl.load(weight2_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + 3 * C * C + offs, w.to(out_ptr.dtype.element_ty), mask=mask)


def config(kernel: str, C: int) -> dict[str, int | None]:
    """Tile and schedule of "first", "second" (convolution), their "_bwd", or "weights_bwd".

    Chosen by registers and shared memory for two to four programs a multiprocessor; not measured
    yet. Of a narrow unit the schedule is that of `SCHEDULE`.
    """
    if is_narrow(C):
        return {"BLOCK_T": 64, "num_warps": 4, **SCHEDULES[SCHEDULE][kernel]}
    widest = C & -C  # the largest power of two in C
    block = {"BLOCK_T": 128, "BLOCK_N": min(128, widest), "STAGES": 3, "num_warps": 8}
    if kernel == "weights_bwd":
        return {**block, "BLOCK_T": 64, "BLOCK_M": min(128, widest)}
    return {**block, "BLOCK_K": min(64, widest), "maxnreg": 128}


def is_narrow(C: int) -> bool:
    """Whether the weights of all taps stay in shared memory."""
    return C <= MOST_RESIDENT and C & (C - 1) == 0


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    if not x.is_cuda:
        return PROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def packs(dtype: torch.dtype) -> bool:
    """Whether leaky ReLU is taken of two values at a time."""
    return dtype == torch.float16 or not triton.knobs.runtime.interpret


def packed(weight1: Tensor, weight2: Tensor, x: Tensor) -> Tensor:
    """Both weights (C_out, C_in, 3) as (2, 3, C_in, C_out) of x's dtype."""
    C = x.shape[2]
    out, BLOCK = x.new_empty(2, 3, C, C), 1024
    with torch.cuda.device_of(x):
        _residual_unit_pack_kernel[(2 * triton.cdiv(3 * C * C, BLOCK),)](
            weight1.contiguous(), weight2.contiguous(), out, C=C, BLOCK=BLOCK
        )
    return out


def residual_unit(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """y and a, both like x (B, T, C), dense, C a multiple of 16; an x that is not is copied."""
    x = x.contiguous()
    out, a = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel() == 0:
        return out, a
    weights = packed(weight1, weight2, x)
    lengths = None if lengths_frames is None else lengths_frames.contiguous()
    _convolve("first", x, weights[0], bias1, x, a, lengths, dilation)
    _convolve("second", a, weights[1], bias2, x, out, lengths, 1)
    return out, a


def _convolve(
    which: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    dilation: int,
) -> None:
    B, T, C = x.shape
    options = config(which, C)
    options |= {"FIRST": which == "first", "RAGGED": lengths is not None, "PACKED": packs(x.dtype)}
    n_tiles = B * triton.cdiv(T, options["BLOCK_T"])
    inputs = (x, weight, bias.contiguous(), skip, out, x if lengths is None else lengths)
    with torch.cuda.device_of(x):
        if is_narrow(C):
            n_programs = min(n_tiles, options.pop("PER_PROCESSOR") * processors(x))
            _residual_unit_narrow_fwd_kernel[(n_programs,)](
                *inputs, T, dilation, n_tiles, C=C, **options
            )
        else:
            grid = (n_tiles * (C // options["BLOCK_N"]),)
            _residual_unit_fwd_kernel[grid](*inputs, T, dilation, C=C, **options)
