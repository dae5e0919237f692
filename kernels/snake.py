"""The snake activation, frame-major, and its gradients.

    y = x + sin(a x)^2 / a,   zero beyond a row's real frames
    dx = g (1 + sin(2 a x)),   da = sum g (x sin(2 a x) - sin(a x)^2 / a) / a

x, g (B, T, C) float32, bf16 or float16; a (C,) positive, float32; y, dx (B, T, C) dense.
Arithmetic is float32.

sin(v)^2 and sin(2 v) repeat with pi: r = a x - k pi, |r| <= pi / 2 and a little, from the product's
two halves and pi in three parts; odd and even polynomials of degree 9 and 8 give sin(r) and cos(r)
within 1e-7. Beyond a x = 2^22, where the term of the sine has no digit left in y, r is 0.

A program of the backward pass walks over `frames` frames; each thread keeps its own sums of da. One
partial sum a program and channel goes to memory, and those are added in float64 in a fixed order:
no atomics, same input, same bits.

Source: gmm_jepa.ops.snake.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# pi to 72 bits, in three of 24
PI_1 = tl.constexpr(3.1415927410125732)
PI_2 = tl.constexpr(-8.74227765734758577e-08)
PI_3 = tl.constexpr(-3.4302490e-15)
INVERSE_PI = tl.constexpr(0.31830988618379067)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to an integer
FARTHEST = tl.constexpr(4194304.0)


@triton.jit
def _block(
    lengths_ptr, T, frames, C: tl.constexpr, BLOCK_C: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Row, block of frames, first of them, channels, and how many frames of the row are real."""
    n_channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // n_channel_blocks
    offs_c = tl.program_id(0) % n_channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n_blocks = tl.cdiv(T, frames)
    row = block // n_blocks
    n = T
    if RAGGED:
        n = tl.minimum(tl.load(lengths_ptr + row), T).to(tl.int32)
    return row.to(tl.int64), block, block % n_blocks * frames, offs_c, n


@triton.jit
def _remainder(a, x):
    """a x less the nearest multiple of pi; NaN of what is not finite."""
    product = a * x
    turns = (product * INVERSE_PI + ROUNDING) - ROUNDING
    r = tl.fma(turns, -PI_1, product)
    r = tl.fma(turns, -PI_2, r)
    r = tl.fma(turns, -PI_3, r) - tl.fma(-a, x, product)
    # Zero or NaN; a difference would be contracted with the product: its rounding error.
    return tl.where(tl.abs(product) > FARTHEST, product * 0.0, r)


@triton.jit
def _sine(r, square):
    """sin(r) of |r| <= pi / 2; square is r^2."""
    p = square * 2.6054781301354524e-06 - 1.9809474179055542e-04
    p = p * square + 8.333064615726471e-03
    p = p * square - 1.6666659712791443e-01
    return r * square * p + r


@triton.jit
def _cosine(square):
    """cos(r) of |r| <= pi / 2; square is r^2."""
    p = square * 2.337658042961266e-05 - 1.386513700708747e-03
    p = p * square + 4.166543111205101e-02
    p = p * square - 0.5
    return p * square + 1.0


@triton.jit(do_not_specialize=["T"])
def _snake_fwd_kernel(
    x_ptr, a_ptr, lengths_ptr, out_ptr, T,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, _, t0, offs_c, n = _block(lengths_ptr, T, BLOCK_T, C, BLOCK_C, RAGGED)
    mask_c = tl.full((BLOCK_C,), True, dtype=tl.int1) if C % BLOCK_C == 0 else offs_c < C
    offs_t = tl.arange(0, BLOCK_T)
    mask = (offs_t < n - t0)[:, None] & mask_c[None, :]
    a = tl.load(a_ptr + offs_c, mask=mask_c, other=1.0)
    at = (row * T + t0) * C + (offs_t[:, None] * C + offs_c[None, :])
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    r = _remainder(a[None, :], x)
    s = _sine(r, r * r)
    y = s * s * tl.div_rn(1.0, a)[None, :] + x  # zero where x is, beyond the real frames
    inside = (offs_t < T - t0)[:, None] & mask_c[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "frames"])
def _snake_bwd_kernel(
    x_ptr, g_ptr, a_ptr, lengths_ptr, dx_ptr, partials_ptr, T, frames,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    row, block, t0, offs_c, n = _block(lengths_ptr, T, frames, C, BLOCK_C, RAGGED)
    mask_c = tl.full((BLOCK_C,), True, dtype=tl.int1) if C % BLOCK_C == 0 else offs_c < C
    a = tl.load(a_ptr + offs_c, mask=mask_c, other=1.0)
    inverse = tl.div_rn(1.0, a)
    # frames of one slot belong to one thread
    offs_t = tl.arange(0, ROWS)[None, :, None] * SLOTS + tl.arange(0, SLOTS)[:, None, None]
    offsets = offs_t * C + offs_c[None, None, :]  # (SLOTS, ROWS, BLOCK_C)
    of_a = tl.zeros((SLOTS, BLOCK_C), dtype=tl.float32)
    for t in range(t0, tl.minimum(t0 + frames, T), SLOTS * ROWS):
        mask = (offs_t < n - t) & mask_c[None, None, :]
        at = (row * T + t) * C + offsets
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        r = _remainder(a[None, None, :], x)
        s = _sine(r, r * r)
        double_sine = 2.0 * s * _cosine(r * r)
        of_a += tl.sum(g * (double_sine * x - s * s * inverse[None, None, :]), axis=1)
        inside = (offs_t < T - t) & mask_c[None, None, :]
        tl.store(dx_ptr + at, (g * double_sine + g).to(dx_ptr.dtype.element_ty), mask=inside)
    partials_ptrs = partials_ptr + block.to(tl.int64) * C + offs_c
    tl.store(partials_ptrs, tl.sum(of_a, axis=0) * inverse, mask=mask_c)


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tile of y: 128 bytes of channels, 16 a load, of 2 frames a thread; not measured yet."""
    return {"BLOCK_T": 32, "BLOCK_C": 128 // dtype.itemsize, "num_warps": 4}


def config_of_gradients(dtype: torch.dtype) -> dict[str, int]:
    """Tile of dx, likewise, and the frames of a program; not measured yet."""
    tile = {"BLOCK_C": 128 // dtype.itemsize, "SLOTS": 16, "ROWS": 2}
    return {"frames": 256, **tile, "num_warps": 4}


def snake(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """y (B, T, C), dense, of x's dtype."""
    B, T, C = x.shape
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    tile = config(x.dtype)
    grid = (B * triton.cdiv(T, tile["BLOCK_T"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        _snake_fwd_kernel[grid](
            x.contiguous(),
            a.float().contiguous(),
            a if lengths_frames is None else lengths_frames.contiguous(),
            out,
            T,
            C=C,
            RAGGED=lengths_frames is not None,
            **tile,
        )
    return out


def snake_backward(
    grad: Tensor, x: Tensor, a: Tensor, lengths_frames: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, T, C), dense, and a (C,), each of its own dtype."""
    B, T, C = x.shape
    d_x, d_a = x.new_empty(x.shape), a.new_empty(a.shape)
    if x.numel() == 0:
        return d_x, d_a.zero_()
    tile = config_of_gradients(x.dtype)
    n_blocks = B * triton.cdiv(T, tile["frames"])
    partials = x.new_empty((n_blocks, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _snake_bwd_kernel[(n_blocks * triton.cdiv(C, tile["BLOCK_C"]),)](
            x.contiguous(),
            grad.contiguous(),
            a.float().contiguous(),
            a if lengths_frames is None else lengths_frames.contiguous(),
            d_x,
            partials,
            T,
            C=C,
            RAGGED=lengths_frames is not None,
            **tile,
        )
        d_a.copy_(partials.sum(0, dtype=torch.float64))
    return d_x, d_a
