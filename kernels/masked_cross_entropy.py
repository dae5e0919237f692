"""Masked cross-entropy of softmax(logits) against hard labels, with the gradient, in one op.

    q = softmax_k(logits_nk)
    loss = -sum_n w_n log q_n[label_n],   gradient_nk = w_n (q_nk - [k = label_n])

logits (N, K) float32, bf16 or float16, any strides; labels (N,) int64; w (N,) row weights. Rows
of weight 0 are not read; their gradient is filled with zeros. A label outside 0..K - 1 makes the
loss NaN. The second walk over a row, which writes the gradient, finds the logits in L2.

Source: gmm_jepa.ops.losses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import LOWEST


@triton.jit(do_not_specialize=["N"])
def _masked_cross_entropy_fwd_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    gradient_ptr,
    partials_ptr,
    N,
    stride_l_n,
    stride_l_k,
    stride_t_n,
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
    label = tl.load(labels_ptr + rows * stride_t_n, mask=mask_n, other=0)
    logits_ptrs = logits_ptr + rows[:, None] * stride_l_n
    largest = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    best = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        k64 = offs_k.to(tl.int64)[None, :]
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=LOWEST).to(tl.float32)
        block_largest = tl.max(a, 1)
        first = tl.min(tl.where(a == block_largest[:, None], offs_k[None, :], K - 1), 1)
        best = tl.where(block_largest > largest, first, best)
        new_largest = tl.maximum(largest, block_largest)
        share = tl.sum(tl.exp(a - new_largest[:, None]), 1)
        total = tl.exp(largest - new_largest) * total + share
        largest = new_largest
    known = (label >= 0) & (label < K)
    chosen_ptrs = logits_ptr + rows * stride_l_n + label * stride_l_k
    chosen = tl.load(chosen_ptrs, mask=mask_n & known, other=float("nan")).to(tl.float32)
    log_total = tl.log(total)
    loss = log_total + (largest - chosen)
    partials = partials_ptr + program * 2
    tl.store(partials, tl.sum(tl.where(mask_n, w * loss, 0.0), 0))
    tl.store(partials + 1, tl.sum(tl.where(mask_n & (best == label), w, 0.0), 0))
    if WITH_GRADIENT:
        gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            k64 = offs_k.to(tl.int64)[None, :]
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=0.0).to(tl.float32)
            q = tl.exp((a - largest[:, None]) - log_total[:, None])
            gradient = w[:, None] * tl.where(k64 == label[:, None], q - 1.0, q)
            gradient = tl.where(mask, gradient, 0.0).to(gradient_ptr.dtype.element_ty)
            mask = (rows < N)[:, None] & (offs_k < K)[None, :]
            tl.store(gradient_ptrs + k64 * stride_g_k, gradient, mask=mask)


def config(K: int) -> dict[str, int]:
    """Tile and schedule: 4,096 values at a time, 32 a thread."""
    BLOCK_K = min(1024, max(16, triton.next_power_of_2(K)))
    return {"BLOCK_T": 4096 // BLOCK_K, "BLOCK_K": BLOCK_K, "num_warps": 4}


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, row_weights: Tensor, *, with_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, 0 and agreement (scalars float32), gradient (N, K), dense, or empty."""
    N, K = logits.shape
    gradient = logits.new_empty(logits.shape if with_gradient else 0)
    zero = logits.new_zeros((), dtype=torch.float32)
    if N == 0:
        return zero, zero.clone(), zero.clone(), gradient
    tile = config(K)
    n_programs = triton.cdiv(N, tile["BLOCK_T"])
    partials = logits.new_empty((n_programs, 2), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _masked_cross_entropy_fwd_kernel[(n_programs,)](
            logits,
            labels,
            row_weights,
            gradient if with_gradient else logits,
            partials,
            N,
            *logits.stride(),
            *labels.stride(),
            *row_weights.stride(),
            *(gradient.stride() if with_gradient else (0, 0)),
            K=K,
            WITH_GRADIENT=with_gradient,
            **tile,
        )
    totals = partials.sum(0, dtype=torch.float64)
    return totals[0].float(), zero, totals[1].float(), gradient
