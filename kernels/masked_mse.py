"""Masked mean squared error of predicted latents, with the gradient, in one op.

    loss = sum_n w_n mean_c (prediction_nc - target_nc)^2
    gradient_nc = 2 w_n / C (prediction_nc - target_nc)

prediction, target (N, C) float32, bf16 or float16, any strides; w (N,) row weights. Rows of
weight 0 are not read; their gradient is filled with zeros.

Source: gmm_jepa.ops.losses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N"])
def _masked_mse_fwd_kernel(
    prediction_ptr,
    target_ptr,
    weights_ptr,
    gradient_ptr,
    partials_ptr,
    N,
    stride_p_n,
    stride_p_c,
    stride_t_n,
    stride_t_c,
    stride_w_n,
    stride_g_n,
    stride_g_c,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    program = tl.program_id(0)
    rows = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.load(weights_ptr + rows * stride_w_n, mask=rows < N, other=0.0).to(tl.float32)
    mask_n = w != 0.0
    squares = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        c64 = offs_c.to(tl.int64)[None, :]
        mask = mask_n[:, None] & (offs_c < C)[None, :]
        prediction_ptrs = prediction_ptr + rows[:, None] * stride_p_n + c64 * stride_p_c
        target_ptrs = target_ptr + rows[:, None] * stride_t_n + c64 * stride_t_c
        prediction = tl.load(prediction_ptrs, mask=mask, other=0.0).to(tl.float32)
        error = prediction - tl.load(target_ptrs, mask=mask, other=0.0).to(tl.float32)
        squares += error * error
        if WITH_GRADIENT:
            gradient = tl.where(mask, (w * (2.0 / C))[:, None] * error, 0.0)
            gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n + c64 * stride_g_c
            mask = (rows < N)[:, None] & (offs_c < C)[None, :]
            tl.store(gradient_ptrs, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
    loss = tl.sum(squares, 1) * (1.0 / C)
    tl.store(partials_ptr + program, tl.sum(tl.where(mask_n, w * loss, 0.0), 0))


def config(C: int) -> dict[str, int]:
    """Tile and schedule: 4,096 values at a time, 32 a thread."""
    BLOCK_C = min(512, max(16, triton.next_power_of_2(C)))
    return {"BLOCK_T": 4096 // BLOCK_C, "BLOCK_C": BLOCK_C, "num_warps": 4}


def masked_mse(
    prediction: Tensor, target: Tensor, row_weights: Tensor, *, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss (scalar float32), gradient (N, C), dense, or empty."""
    N, C = prediction.shape
    gradient = prediction.new_empty(prediction.shape if with_gradient else 0)
    if N == 0 or C == 0:
        return prediction.new_zeros((), dtype=torch.float32), gradient
    tile = config(C)
    n_programs = triton.cdiv(N, tile["BLOCK_T"])
    partials = prediction.new_empty(n_programs, dtype=torch.float32)
    with torch.cuda.device_of(prediction):
        _masked_mse_fwd_kernel[(n_programs,)](
            prediction,
            target,
            row_weights,
            gradient if with_gradient else prediction,
            partials,
            N,
            *prediction.stride(),
            *target.stride(),
            *row_weights.stride(),
            *(gradient.stride() if with_gradient else (0, 0)),
            C=C,
            WITH_GRADIENT=with_gradient,
            **tile,
        )
    return partials.sum(dtype=torch.float64).float(), gradient
