"""Posteriors of frames under a diagonal Gaussian mixture, in one pass over frames and output.

    posterior_tk = softmax_k(log p(x_t, k) / temperature), or its logarithm

frames (T, D) float32, bf16 or float16, any strides; out (T, K) float32, bf16 or float16. A program
holds BLOCK_T frames and walks over the components in blocks: it writes each block relative to the
running maximum, then, with the row's sum known, reads its own rows back (from L2) and rescales
them in place. So the matrix product is made once, and no other memory is used.

Source: gmm_jepa.ops.posterior; log-densities from gaussian.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import BLOCK_F, LOWEST, Operand, log_joint, row_scale


@triton.jit(do_not_specialize=["T"])
def _gmm_posterior_fwd_kernel(
    x_ptr,
    out_ptr,
    affine_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    T,
    stride_x_t,
    stride_x_d,
    inverse_temperature,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K_PAD: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # a power of two
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EXACT: tl.constexpr,
    LOG: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_T
    offs_t = tl.arange(0, BLOCK_T)
    rows = first_row + offs_t
    mask_t = rows < T
    scale_t = row_scale(
        x_ptr, rows, mask_t, stride_x_t, stride_x_d, affine_ptr, D, F, BLOCK_T, BLOCK_F, EXACT
    )
    DTYPE: tl.constexpr = tl.float64 if EXACT else tl.float32  # of log-densities, not of shares
    largest = tl.full((BLOCK_T,), LOWEST, dtype=DTYPE)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    offs_b = tl.arange(0, N_BLOCKS)
    references = tl.zeros((BLOCK_T, N_BLOCKS), dtype=DTYPE)  # running maximum at each block
    out_ptrs = out_ptr + first_row * K + offs_t[:, None] * K
    for block in range(K_PAD // BLOCK_K):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        joint = log_joint(
            x_ptr, rows, mask_t, stride_x_t, stride_x_d, scale_t,
            affine_ptr, weight_ptr, scale_ptr, bias_ptr, offs_k, inverse_temperature,
            D, F, K_PAD, BLOCK_T, BLOCK_K, BLOCK_F, EXACT,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(joint, 1))
        relative = (joint - new_largest[:, None]).to(tl.float32)
        share = tl.exp(relative)
        total = total * tl.exp((largest - new_largest).to(tl.float32)) + tl.sum(share, 1)
        largest = new_largest
        references = tl.where((offs_b == block)[None, :], largest[:, None], references)
        kept = relative if LOG else share
        mask = mask_t[:, None] & (offs_k < K)[None, :]
        tl.store(out_ptrs + offs_k[None, :], kept.to(out_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # what is read back may have been written by another thread of the program
    log_total = largest + tl.log(total)
    for block in range(K_PAD // BLOCK_K):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = mask_t[:, None] & (offs_k < K)[None, :]
        kept = tl.load(out_ptrs + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        reference = tl.sum(tl.where((offs_b == block)[None, :], references, 0.0), 1)
        offset = (reference - log_total).to(tl.float32)
        if LOG:
            kept += offset[:, None]
            kept = tl.where(kept < 0.1 * LOWEST, float("-inf"), kept)
        else:
            kept *= tl.exp(offset)[:, None]
        tl.store(out_ptrs + offs_k[None, :], kept.to(out_ptr.dtype.element_ty), mask=mask)


def config(K_pad: int, exact: int) -> dict[str, int]:
    """Tile and schedule: the largest that compiles for sm_90 without spills (bench/results)."""
    if exact and K_pad > 2048:  # 64 rows of float64 maxima spill 260 bytes at K = 8,192
        return {"BLOCK_T": 32, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1}
    if exact:
        return {"BLOCK_T": 64, "BLOCK_K": min(64, K_pad), "num_warps": 8, "num_stages": 1}
    # Past 2,048 components the running maxima of 128 rows would not stay in registers.
    if K_pad > 2048:  # three stages spill 16 bytes at K = 8,192 and D = 80
        return {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_T": 128, "BLOCK_K": min(128, K_pad), "num_warps": 8, "num_stages": 3}


def gmm_posterior(
    frames: Tensor,
    operand: Operand,
    n_components: int,
    *,
    temperature: float = 1.0,
    log: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Frames (T, D) -> posteriors (T, K) of `out_dtype`; `operand` says fast or exact."""
    T, D = frames.shape
    out = frames.new_empty((T, n_components), dtype=out_dtype)
    if T == 0:
        return out
    F, K_pad = operand.weight.shape[1:]
    tile = config(K_pad, operand.exact)
    with torch.cuda.device_of(frames):
        _gmm_posterior_fwd_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
            frames,
            out,
            operand.affine,
            operand.weight,
            operand.scale,
            operand.bias,
            T,
            *frames.stride(),
            1.0 / temperature,
            K=n_components,
            D=D,
            F=F,
            K_PAD=K_pad,
            N_BLOCKS=triton.next_power_of_2(K_pad // tile["BLOCK_K"]),
            BLOCK_F=BLOCK_F,
            EXACT=operand.exact,
            LOG=log,
            **tile,
        )
    return out
