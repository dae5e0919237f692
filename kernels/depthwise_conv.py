"""Depthwise convolution over time, frame-major, and its gradients.

    y[t, c] = bias[c] + sum_k w[c, k] x[t + k - K // 2, c],   x zero beyond a row's ends
    dx[t, c] = sum_k w[c, K - 1 - k] g[t + k - K // 2, c]
    dw[c, k] = sum_t g[t, c] x[t + k - K // 2, c],   dbias[c] = sum_t g[t, c]

x, g (B, T, C) float32, bf16 or float16, any strides; w (C, K), K odd, up to 63; y, dx (B, T, C)
dense, of x's dtype. Weights are float32, and so are sums.

One kernel gives y and, with the taps turned round, dx: a program holds BLOCK_T frames of BLOCK_C
channels and adds one tap after the other. A row of a tile is 128 bytes, a line of L1; the tile and
its K - 1 neighbours (12 KB at 31 taps) are read K times, and but for the first time from there.
The last tap comes first: it and the next one, the first, together touch all rows, and their
misses wait side by side instead of one a tap.

The other kernel holds all taps of BLOCK_C channels and walks over the frames of a chunk: each
thread keeps the sums of its own taps and channels, so nothing is added across threads. Frames go
in pairs: the K + 1 rows of x that two neighbours see are read and widened once, and the later
frame's sums lie one tap further on, for which they are moved at the end. One partial sum a chunk
goes to memory, K rows of C, and those are added in float64 in a fixed order: no atomics, same
input, same bits. dbias is torch's own sum.

Source: gmm_jepa.ops.depthwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _row_block_and_channels(T, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch row, first frame and channels of this program; channels of a frame are neighbours."""
    n_channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // n_channel_blocks
    offs_c = tl.program_id(0) % n_channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n_blocks = tl.cdiv(T, BLOCK_T)
    return block // n_blocks, block % n_blocks * BLOCK_T, offs_c


@triton.jit
def _sum_of_taps(
    x_ptr, taps_ptr, offs_t, offs_c, T,
    stride_x_t, stride_x_c,
    C: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    FLIPPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_T, BLOCK_C) float32; EDGE: a tap may reach beyond the row's frames."""
    y = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    mask_c = tl.full((BLOCK_C,), True, dtype=tl.int1) if C % BLOCK_C == 0 else offs_c < C
    first = offs_t - K // 2
    x_ptrs = x_ptr + first.to(tl.int64)[:, None] * stride_x_t
    x_ptrs += offs_c.to(tl.int64)[None, :] * stride_x_c
    for i in range(K):
        k = tl.where(i == 0, K - 1, i - 1)
        mask = mask_c[None, :]
        if EDGE:
            mask = mask & ((first + k >= 0) & (first + k < T))[:, None]
        w = tl.load(taps_ptr + (K - 1 - k if FLIPPED else k) * C + offs_c, mask=mask_c, other=0.0)
        x = tl.load(x_ptrs + k.to(tl.int64) * stride_x_t, mask=mask, other=0.0)
        y += w[None, :] * x.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["T"])
def _depthwise_conv_fwd_kernel(
    x_ptr, taps_ptr, bias_ptr, out_ptr, T,
    stride_x_b, stride_x_t, stride_x_c,
    C: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    FLIPPED: tl.constexpr, WITH_BIAS: tl.constexpr,
):  # fmt: skip
    row, t0, offs_c = _row_block_and_channels(T, C, BLOCK_T, BLOCK_C)
    offs_t = t0 + tl.arange(0, BLOCK_T)
    x_ptr += row.to(tl.int64) * stride_x_b
    if (t0 >= K // 2) & (t0 + BLOCK_T + K // 2 <= T):
        y = _sum_of_taps(
            x_ptr, taps_ptr, offs_t, offs_c, T, stride_x_t, stride_x_c,
            C, K, BLOCK_T, BLOCK_C, FLIPPED, False,
        )  # fmt: skip
    else:
        y = _sum_of_taps(
            x_ptr, taps_ptr, offs_t, offs_c, T, stride_x_t, stride_x_c,
            C, K, BLOCK_T, BLOCK_C, FLIPPED, True,
        )  # fmt: skip
    if WITH_BIAS:
        y += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (row.to(tl.int64) * T + offs_t)[:, None] * C + offs_c[None, :]
    mask = (offs_t < T)[:, None] & (offs_c < C)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_frames(
    even, odd, g_ptrs, x_ptrs, t, offs_k, mask_c, T, stride_g_t, stride_x_t,
    FRAMES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Both sums (K_PAD, BLOCK_C) with FRAMES more of them, from t on; EDGE: some do not exist."""
    for i in tl.static_range(0, FRAMES, 2):
        mask0, mask1, mask_x = mask_c, mask_c, mask_c[None, :]
        if EDGE:
            rows = t + i + offs_k
            mask0 = mask_c & (t + i < T)
            mask1 = mask_c & (t + i + 1 < T)
            mask_x = mask_x & ((rows >= 0) & (rows < T))[:, None]
        at = tl.cast(t + i, tl.int64)
        x = tl.load(x_ptrs + at * stride_x_t, mask=mask_x, other=0.0).to(tl.float32)
        g0 = tl.load(g_ptrs + at * stride_g_t, mask=mask0, other=0.0)
        g1 = tl.load(g_ptrs + (at + 1) * stride_g_t, mask=mask1, other=0.0)
        even += g0.to(tl.float32)[None, :] * x
        odd += g1.to(tl.float32)[None, :] * x
    return even, odd


@triton.jit(do_not_specialize=["T"])
def _depthwise_conv_bwd_taps_kernel(
    g_ptr, x_ptr, partials_ptr, T,
    stride_g_b, stride_g_t, stride_g_c,
    stride_x_b, stride_x_t, stride_x_c,
    C: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    row, t0, offs_c = _row_block_and_channels(T, C, BLOCK_T, BLOCK_C)
    mask_c = tl.full((BLOCK_C,), True, dtype=tl.int1) if C % BLOCK_C == 0 else offs_c < C
    taps = tl.arange(0, K_PAD)
    offs_k = taps - K // 2
    g_ptrs = g_ptr + row.to(tl.int64) * stride_g_b + offs_c.to(tl.int64) * stride_g_c
    x_ptr += row.to(tl.int64) * stride_x_b
    x_ptrs = x_ptr + offs_k.to(tl.int64)[:, None] * stride_x_t
    x_ptrs += offs_c.to(tl.int64)[None, :] * stride_x_c
    even = tl.zeros((K_PAD, BLOCK_C), dtype=tl.float32)
    odd = tl.zeros((K_PAD, BLOCK_C), dtype=tl.float32)  # of tap k - 1 at place k
    for t in range(t0, tl.minimum(t0 + BLOCK_T, T), FRAMES):
        if (t >= K // 2) & (t + FRAMES - 2 + K_PAD - K // 2 <= T):
            even, odd = _add_frames(
                even, odd, g_ptrs, x_ptrs, t, offs_k, mask_c, T, stride_g_t, stride_x_t,
                FRAMES, False,
            )  # fmt: skip
        else:
            even, odd = _add_frames(
                even, odd, g_ptrs, x_ptrs, t, offs_k, mask_c, T, stride_g_t, stride_x_t,
                FRAMES, True,
            )  # fmt: skip
    after = tl.minimum(taps + 1, K_PAD - 1)
    sums = even + tl.gather(odd, tl.broadcast_to(after[:, None], (K_PAD, BLOCK_C)), 0)
    chunk = row.to(tl.int64) * tl.cdiv(T, BLOCK_T) + t0 // BLOCK_T
    partials_ptrs = partials_ptr + (chunk * K + taps)[:, None] * C + offs_c[None, :]
    tl.store(partials_ptrs, sums, mask=(taps < K)[:, None] & (offs_c < C)[None, :])


def config(dtype: torch.dtype) -> dict[str, int]:
    """Tile of y and dx: 128 bytes of channels, 16 a load; 4 frames of them a thread.

    Chosen by count: 2 bytes from L1 and 2.5 instructions a multiply-add in bf16.
    """
    return {"BLOCK_T": 64, "BLOCK_C": 128 // dtype.itemsize, "num_warps": 4}


def config_of_taps(dtype: torch.dtype) -> dict[str, int]:
    """Chunk and schedule of dw: at 31 taps the partial sums are half as large as a bf16 x."""
    return {"BLOCK_T": 128, "BLOCK_C": 128 // dtype.itemsize, "FRAMES": 4, "num_warps": 4}


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, flipped: bool = False
) -> Tensor:
    """(B, T, C) of x's dtype; `flipped`: the last tap is the first."""
    B, T, C = x.shape
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    taps = weight.reshape(C, -1).T.float().contiguous()  # channels side by side
    tile = config(x.dtype)
    grid = (B * triton.cdiv(T, tile["BLOCK_T"]) * triton.cdiv(C, tile["BLOCK_C"]),)
    with torch.cuda.device_of(x):
        _depthwise_conv_fwd_kernel[grid](
            x,
            taps,
            taps if bias is None else bias.contiguous(),
            out,
            T,
            *x.stride(),
            C=C,
            K=len(taps),
            FLIPPED=flipped,
            WITH_BIAS=bias is not None,
            **tile,
        )
    return out


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, T, C), of weight in its shape, and of bias (C,), or (0,) without one."""
    (B, T, C), K = x.shape, weight.shape[-1]
    d_bias = weight.new_empty(C if with_bias else 0)
    d_weight = weight.new_empty(weight.shape)
    if x.numel() == 0:
        return x.new_empty(x.shape), d_weight.zero_(), d_bias.zero_()
    tile = config_of_taps(x.dtype)
    n_chunks = B * triton.cdiv(T, tile["BLOCK_T"])
    partials = x.new_empty((n_chunks, K, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _depthwise_conv_bwd_taps_kernel[(n_chunks * triton.cdiv(C, tile["BLOCK_C"]),)](
            grad,
            x,
            partials,
            T,
            *grad.stride(),
            *x.stride(),
            C=C,
            K=K,
            K_PAD=max(16, triton.next_power_of_2(K + 1)),
            **tile,
        )
    d_weight.view(C, K).copy_(partials.sum(0, dtype=torch.float64).T)
    if with_bias:
        d_bias.copy_(grad.sum((0, 1), dtype=torch.float32))
    return depthwise_conv(grad, weight, None, flipped=True), d_weight, d_bias
