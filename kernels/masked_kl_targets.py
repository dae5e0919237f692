"""Masked KL from given target distributions to softmax(logits), with the gradient, in one op.

    q = softmax_k(logits_nk)
    loss = sum_n w_n sum_k p_nk (log p_nk - log q_nk),   gradient_nk = w_n (q_nk sum_j p_nj - p_nk)

logits, targets p (N, K) float32, bf16 or float16, any strides; w (N,) row weights. Rows of weight
0 are not read; their gradient is filled with zeros. The second walk over a row, which writes the
gradient, finds logits and targets in L2.

Source: gmm_jepa.ops.losses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import LOWEST


@triton.jit(do_not_specialize=["N"])
def _masked_kl_targets_fwd_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    gradient_ptr,
    partials_ptr,
    N,
    stride_l_n,
    stride_l_k,
    stride_t_n,
    stride_t_k,
    stride_w_n,
    stride_g_n,
    stride_g_k,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    program = tl.program_id(0)
    rows = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.load(weights_ptr + rows * stride_w_n, mask=rows < N, other=0.0).to(tl.float32)
    mask_n = w != 0.0
    logits_ptrs = logits_ptr + rows[:, None] * stride_l_n
    targets_ptrs = targets_ptr + rows[:, None] * stride_t_n
    largest_a = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    sum_a = tl.zeros((BLOCK_T,), dtype=tl.float32)  # sum of e^(a - largest_a)
    sum_p = tl.zeros((BLOCK_T,), dtype=tl.float32)
    sum_pp = tl.zeros((BLOCK_T,), dtype=tl.float32)  # sum of p log p
    sum_pa = tl.zeros((BLOCK_T,), dtype=tl.float32)  # sum of p (a - largest_a)
    largest_p = tl.full((BLOCK_T,), -1.0, dtype=tl.float32)
    best_p = tl.zeros((BLOCK_T,), dtype=tl.int32)
    best_a = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k64 = offs_k.to(tl.int64)[None, :]
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=LOWEST).to(tl.float32)
        p = tl.load(targets_ptrs + k64 * stride_t_k, mask=mask, other=0.0).to(tl.float32)
        block_a = tl.max(a, 1)
        first = tl.min(tl.where(a == block_a[:, None], offs_k[None, :], K - 1), 1)
        best_a = tl.where(block_a > largest_a, first, best_a)
        block_p = tl.max(p, 1)
        first = tl.min(tl.where(p == block_p[:, None], offs_k[None, :], K - 1), 1)
        best_p = tl.where(block_p > largest_p, first, best_p)
        largest_p = tl.maximum(largest_p, block_p)
        new_a = tl.maximum(largest_a, block_a)
        a -= new_a[:, None]
        step = largest_a - new_a
        sum_pa += step * sum_p + tl.sum(p * a, 1)
        sum_p += tl.sum(p, 1)
        # 1.2e-38 is the smallest normal number: 0 log 0 = 0
        sum_pp += tl.sum(p * tl.log(tl.where(p < 1.1754944e-38, 1.1754944e-38, p)), 1)
        sum_a = tl.exp(step) * sum_a + tl.sum(tl.exp(a), 1)
        largest_a = new_a
    log_sum_a = tl.log(sum_a)
    loss = sum_pp - sum_pa + sum_p * log_sum_a
    partials = partials_ptr + program * 3
    tl.store(partials, tl.sum(tl.where(mask_n, w * loss, 0.0), 0))
    tl.store(partials + 1, tl.sum(tl.where(mask_n, -w * sum_pp, 0.0), 0))
    tl.store(partials + 2, tl.sum(tl.where(mask_n & (best_p == best_a), w, 0.0), 0))
    if WITH_GRADIENT:
        gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n
        total_a = largest_a + log_sum_a
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            k64 = offs_k.to(tl.int64)[None, :]
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=0.0).to(tl.float32)
            p = tl.load(targets_ptrs + k64 * stride_t_k, mask=mask, other=0.0).to(tl.float32)
            gradient = w[:, None] * (tl.exp(a - total_a[:, None]) * sum_p[:, None] - p)
            gradient = tl.where(mask, gradient, 0.0).to(gradient_ptr.dtype.element_ty)
            mask = (rows < N)[:, None] & (offs_k < K)[None, :]
            tl.store(gradient_ptrs + k64 * stride_g_k, gradient, mask=mask)


def config(K: int) -> dict[str, int]:
    """Tile and schedule: 4,096 values at a time, 32 a thread."""
    BLOCK_K = min(1024, max(16, triton.next_power_of_2(K)))
    return {"BLOCK_T": 4096 // BLOCK_K, "BLOCK_K": BLOCK_K, "num_warps": 4}


def masked_kl_targets(
    logits: Tensor, targets: Tensor, row_weights: Tensor, *, with_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy and agreement (scalars float32), gradient (N, K), dense, or empty."""
    gradient = logits.new_empty(logits.shape if with_gradient else 0)
    partials = partial_sums(logits, targets, row_weights, gradient if with_gradient else None)
    return *sums_of(partials), gradient


def sums_of(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, entropy and agreement of partial sums (n, 3), added in order."""
    totals = partials.sum(0, dtype=torch.float64)
    return totals[0].float(), totals[1].float(), totals[2].float()


def partial_sums(
    logits: Tensor, targets: Tensor, row_weights: Tensor, gradient: Tensor | None
) -> Tensor:
    """(n, 3) float32: loss, entropy and agreement of each program's rows.

    Writes every row of `gradient` (N, K), any strides, where one is given.
    """
    N, K = logits.shape
    tile = config(K)
    n_programs = triton.cdiv(N, tile["BLOCK_T"])
    partials = logits.new_empty((n_programs, 3), dtype=torch.float32)
    if N == 0:
        return partials
    with torch.cuda.device_of(logits):
        _masked_kl_targets_fwd_kernel[(n_programs,)](
            logits,
            targets,
            row_weights,
            logits if gradient is None else gradient,
            partials,
            N,
            *logits.stride(),
            *targets.stride(),
            *row_weights.stride(),
            *((0, 0) if gradient is None else gradient.stride()),
            K=K,
            WITH_GRADIENT=gradient is not None,
            **tile,
        )
    return partials
