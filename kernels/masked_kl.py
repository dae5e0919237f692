"""Masked KL from a mixture's posteriors to softmax(logits), with the gradient, in one pass.

    p = softmax_k(log p(x_n, k) / temperature),  q = softmax_k(logits_nk)
    loss = sum_n w_n sum_k p (log p - log q),    gradient_nk = w_n (q - p)

logits (N, K), frames (N, D) float32, bf16 or float16, any strides; w (N,) row weights. Weighted
rows are gathered into dense tiles of BLOCK_T through `order`, so rows of weight 0 are never read;
their gradient is filled with zeros. p is made on chip block by block, beside running sums:

    A = sum_k e^(l - max l),   U = sum_k e^(l - max l) (l - max l),
    B = sum_k e^(a - max a),   V = sum_k e^(l - max l) (a - max a)
    entropy = log A - U / A,   loss = (U - V) / A - log A + log B

What the gradient needs of p is l minus the running maximum: it waits in the gradient's own
memory (in 16 bits as a float16, which costs p less than 1e-4) until q and both sums are known.

Source: gmm_jepa.ops.losses; log-densities from gaussian.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import BLOCK_F, LOWEST, Operand, log_joint, row_scale


@triton.jit
def _first_largest(x, largest, offs_k):
    """Index of the first of the largest values of each row: (BLOCK_T,) int32."""
    return tl.min(tl.where(x == largest[:, None], offs_k[None, :], 0x7FFFFFFF), 1)


@triton.jit
def _to_memory(log_ratio, DTYPE: tl.constexpr):
    """What waits in a gradient of type DTYPE: in 16 bits those of a float16."""
    if DTYPE.primitive_bitwidth == 16:
        log_ratio = tl.maximum(log_ratio, -60000.0, propagate_nan=tl.PropagateNan.ALL)
        log_ratio = log_ratio.to(tl.float16).to(DTYPE, bitcast=True)
    return log_ratio


@triton.jit
def _from_memory(kept):
    """What `_to_memory` kept, float32."""
    if kept.dtype.primitive_bitwidth == 16:
        kept = kept.to(tl.float16, bitcast=True)
    return kept.to(tl.float32)


@triton.jit
def _fill_with_zeros(row_ptrs, mask_n, stride_k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Zeros in K columns of the rows that begin at `row_ptrs` (BLOCK_T, 1)."""
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        tl.store(row_ptrs + offs_k.to(tl.int64)[None, :] * stride_k, 0.0, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _masked_kl_fwd_kernel(
    logits_ptr,
    x_ptr,
    weights_ptr,
    order_ptr,
    count_ptr,
    gradient_ptr,
    partials_ptr,
    affine_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    N,
    stride_l_n,
    stride_l_k,
    stride_x_n,
    stride_x_d,
    stride_w_n,
    stride_g_n,
    stride_g_k,
    inverse_temperature,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K_PAD: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    program = tl.program_id(0)
    offs_n = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.load(order_ptr + offs_n, mask=offs_n < N, other=0)  # int64
    count = tl.load(count_ptr)
    mask_n = offs_n < count
    partials = partials_ptr + program * 3
    if program * BLOCK_T >= count:  # no weighted row
        for i in range(3):
            tl.store(partials + i, 0.0)
        if WITH_GRADIENT:
            gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n
            _fill_with_zeros(gradient_ptrs, offs_n < N, stride_g_k, K, BLOCK_K)
        return
    scale_n = row_scale(
        x_ptr, rows, mask_n, stride_x_n, stride_x_d, affine_ptr, D, F, BLOCK_T, BLOCK_F, False
    )
    largest_l = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    largest_a = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    sum_l = tl.zeros((BLOCK_T,), dtype=tl.float32)  # A, U, B, V of the docstring
    sum_ll = tl.zeros((BLOCK_T,), dtype=tl.float32)
    sum_a = tl.zeros((BLOCK_T,), dtype=tl.float32)
    sum_la = tl.zeros((BLOCK_T,), dtype=tl.float32)
    best_l = tl.zeros((BLOCK_T,), dtype=tl.int32)
    best_a = tl.zeros((BLOCK_T,), dtype=tl.int32)
    offs_b = tl.arange(0, N_BLOCKS)
    references = tl.zeros((BLOCK_T, N_BLOCKS), dtype=tl.float32)  # largest_l at each block
    for block in range(K_PAD // BLOCK_K):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        joint = log_joint(
            x_ptr, rows, mask_n, stride_x_n, stride_x_d, scale_n,
            affine_ptr, weight_ptr, scale_ptr, bias_ptr, offs_k, inverse_temperature,
            D, F, K_PAD, BLOCK_T, BLOCK_K, BLOCK_F, False,
        )  # fmt: skip
        block_l = tl.max(joint, 1)
        best_l = tl.where(block_l > largest_l, _first_largest(joint, block_l, offs_k), best_l)
        new_l = tl.maximum(largest_l, block_l)
        joint -= new_l[:, None]
        # read anew: as registers held through the matrix product these addresses would spill
        rows = tl.load(order_ptr + offs_n, mask=offs_n < N, other=0)
        logits_ptrs = logits_ptr + rows[:, None] * stride_l_n
        gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        k64 = offs_k.to(tl.int64)[None, :]
        if WITH_GRADIENT:
            kept = _to_memory(joint, gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptrs + k64 * stride_g_k, kept, mask=mask)
            references = tl.where((offs_b == block)[None, :], new_l[:, None], references)
        share = tl.exp(joint)
        step = largest_l - new_l
        shrink = tl.exp(step)
        sum_ll = shrink * (sum_ll + step * sum_l) + tl.sum(share * joint, 1)
        a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=LOWEST).to(tl.float32)
        block_a = tl.max(a, 1)
        best_a = tl.where(block_a > largest_a, _first_largest(a, block_a, offs_k), best_a)
        new_a = tl.maximum(largest_a, block_a)
        a -= new_a[:, None]
        step = largest_a - new_a
        sum_la = shrink * (sum_la + step * sum_l) + tl.sum(share * a, 1)
        sum_l = shrink * sum_l + tl.sum(share, 1)
        sum_a = tl.exp(step) * sum_a + tl.sum(tl.exp(a), 1)
        largest_l = new_l
        largest_a = new_a
    log_sum_l = tl.log(sum_l)
    log_sum_a = tl.log(sum_a)
    w = tl.load(weights_ptr + rows * stride_w_n, mask=mask_n, other=0.0).to(tl.float32)
    loss = (sum_ll - sum_la) / sum_l - log_sum_l + log_sum_a
    entropy = log_sum_l - sum_ll / sum_l
    tl.store(partials, tl.sum(tl.where(mask_n, w * loss, 0.0), 0))
    tl.store(partials + 1, tl.sum(tl.where(mask_n, w * entropy, 0.0), 0))
    tl.store(partials + 2, tl.sum(tl.where(mask_n & (best_l == best_a), w, 0.0), 0))
    if WITH_GRADIENT:
        tl.debug_barrier()  # what is read back may have been written by another thread
        logits_ptrs = logits_ptr + rows[:, None] * stride_l_n
        gradient_ptrs = gradient_ptr + rows[:, None] * stride_g_n
        total_l = largest_l + log_sum_l
        total_a = largest_a + log_sum_a
        for block in range(K_PAD // BLOCK_K):
            offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            k64 = offs_k.to(tl.int64)[None, :]
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            kept = _from_memory(tl.load(gradient_ptrs + k64 * stride_g_k, mask=mask, other=0.0))
            reference = tl.sum(tl.where((offs_b == block)[None, :], references, 0.0), 1)
            p = tl.exp(kept + (reference - total_l)[:, None])
            a = tl.load(logits_ptrs + k64 * stride_l_k, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.where(mask, w[:, None] * (tl.exp(a - total_a[:, None]) - p), 0.0)
            mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
            gradient = gradient.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptrs + k64 * stride_g_k, gradient, mask=mask)


def config(K_pad: int, with_gradient: bool) -> dict[str, int]:
    """Tile and schedule: the largest that compiles for sm_90 without spills (bench/results)."""
    # Past 2,048 components the running maxima of 128 rows would not stay in registers.
    BLOCK_T = 128 if K_pad <= 2048 else 64
    # Without a gradient three stages spill 16 bytes in float32 at K = 1,024; four none.
    stages = 3 if with_gradient else 4
    return {"BLOCK_T": BLOCK_T, "BLOCK_K": min(64, K_pad), "num_warps": 8, "num_stages": stages}


def weighted_first(row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of weight other than 0, in order, then the rest: (N,) int64, and how many: (1,)."""
    weighted = row_weights != 0
    rank = weighted.cumsum(0)  # of a weighted row among the weighted, from 1
    rows = torch.arange(row_weights.shape[0], device=row_weights.device)
    count = rank[-1:]
    position = torch.where(weighted, rank - 1, count + rows - rank)
    return torch.empty_like(rows).scatter_(0, position, rows), count


def masked_kl(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    operand: Operand,
    *,
    temperature: float = 1.0,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, entropy and agreement (scalars float32), gradient (N, K), dense, or empty."""
    N, K = logits.shape
    gradient = logits.new_empty(logits.shape if with_gradient else 0)
    if N == 0:
        zeros = (logits.new_zeros((), dtype=torch.float32) for _ in range(3))
        return (*zeros, gradient)
    F, K_pad = operand.weight.shape[1:]
    tile = config(K_pad, with_gradient)
    n_programs = triton.cdiv(N, tile["BLOCK_T"])
    partials = logits.new_empty((n_programs, 3), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        order, count = weighted_first(row_weights)
        _masked_kl_fwd_kernel[(n_programs,)](
            logits,
            frames,
            row_weights,
            order,
            count,
            gradient if with_gradient else logits,
            partials,
            operand.affine,
            operand.weight,
            operand.scale,
            operand.bias,
            N,
            *logits.stride(),
            *frames.stride(),
            *row_weights.stride(),
            *(gradient.stride() if with_gradient else (0, 0)),
            1.0 / temperature,
            K=K,
            D=frames.shape[1],
            F=F,
            K_PAD=K_pad,
            N_BLOCKS=triton.next_power_of_2(K_pad // tile["BLOCK_K"]),
            BLOCK_F=BLOCK_F,
            WITH_GRADIENT=with_gradient,
            **tile,
        )
    totals = partials.sum(0, dtype=torch.float64)
    return totals[0].float(), totals[1].float(), totals[2].float(), gradient
