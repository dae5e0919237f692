"""Log-likelihood of frames under a diagonal Gaussian mixture, and the component that fits best.

    log p(x_t) = logsumexp_k log p(x_t, k)
    best_t     = argmax_k log p(x_t, k), with its posterior at a temperature

frames (T, D) float32, bf16 or float16, any strides. Nothing of size (T, K) is ever written: a
program keeps the running maximum, sum and index of its BLOCK_T frames. The first of equal
components wins. Far from the mixture's centre the terms of the split form add up to 1e5 nats, of
which half a unit of float32 is 7e-3, so its log p(x) is log p(x, best) computed once more in the
direct form, less the logarithm of the best component's share.

Source: gmm_jepa.ops.posterior; log-densities from gaussian.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gaussian import BLOCK_F, LOWEST, Operand, log_joint, log_joint_of, row_scale


@triton.jit(do_not_specialize=["T"])
def _gmm_log_likelihood_fwd_kernel(
    x_ptr,
    log_likelihood_ptr,
    posterior_ptr,
    best_ptr,
    affine_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    rows_ptr,
    constant_ptr,
    T,
    stride_x_t,
    stride_x_d,
    inverse_temperature,
    D: tl.constexpr,
    F: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EXACT: tl.constexpr,
    BEST: tl.constexpr,  # posterior and index of the best, rather than the log-likelihood
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < T
    scale_t = row_scale(
        x_ptr, rows, mask_t, stride_x_t, stride_x_d, affine_ptr, D, F, BLOCK_T, BLOCK_F, EXACT
    )
    DTYPE: tl.constexpr = tl.float64 if EXACT else tl.float32  # of log-densities, not of shares
    largest = tl.full((BLOCK_T,), LOWEST, dtype=DTYPE)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    best = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for block in range(K_PAD // BLOCK_K):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        joint = log_joint(
            x_ptr, rows, mask_t, stride_x_t, stride_x_d, scale_t,
            affine_ptr, weight_ptr, scale_ptr, bias_ptr, offs_k, inverse_temperature,
            D, F, K_PAD, BLOCK_T, BLOCK_K, BLOCK_F, EXACT,
        )  # fmt: skip
        block_largest = tl.max(joint, 1)
        if BEST or not EXACT:
            first = tl.min(tl.where(joint == block_largest[:, None], offs_k[None, :], K_PAD - 1), 1)
            best = tl.where(block_largest > largest, first, best)
        new_largest = tl.maximum(largest, block_largest)
        share = tl.sum(tl.exp((joint - new_largest[:, None]).to(tl.float32)), 1)
        total = total * tl.exp((largest - new_largest).to(tl.float32)) + share
        largest = new_largest
    if BEST:
        tl.store(posterior_ptr + rows, 1.0 / total, mask=mask_t)
        tl.store(best_ptr + rows, best.to(tl.int64), mask=mask_t)
    else:
        if not EXACT:
            largest = log_joint_of(
                x_ptr, rows, mask_t, stride_x_t, stride_x_d, best,
                affine_ptr, rows_ptr, constant_ptr, D, F, BLOCK_T, BLOCK_F,
            )  # fmt: skip
        tl.store(log_likelihood_ptr + rows, (largest + tl.log(total)).to(tl.float32), mask=mask_t)


def config(K_pad: int, exact: int) -> dict[str, int]:
    """Tile and schedule: the largest that compiles for sm_90 without spills (bench/results)."""
    if exact:
        return {"BLOCK_T": 64, "BLOCK_K": min(64, K_pad), "num_warps": 8, "num_stages": 1}
    return {"BLOCK_T": 128, "BLOCK_K": min(128, K_pad), "num_warps": 8, "num_stages": 3}


def gmm_log_likelihood(frames: Tensor, operand: Operand) -> Tensor:
    """Frames (T, D) -> log p(x) (T,) float32; `operand` says fast or exact."""
    out = frames.new_empty(frames.shape[:1], dtype=torch.float32)
    _launch(frames, operand, 1.0, (out, out, out), best=False)
    return out


def gmm_argmax(
    frames: Tensor, operand: Operand, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Frames (T, D) -> posterior (T,) float32 and index (T,) int64 of the best component."""
    posterior = frames.new_empty(frames.shape[:1], dtype=torch.float32)
    best = frames.new_empty(frames.shape[:1], dtype=torch.int64)
    _launch(frames, operand, temperature, (posterior, posterior, best), best=True)
    return posterior, best


def _launch(
    frames: Tensor, operand: Operand, temperature: float, outputs: tuple[Tensor, ...], *, best: bool
) -> None:
    T, D = frames.shape
    if T == 0:
        return
    F, K_pad = operand.weight.shape[1:]
    tile = config(K_pad, operand.exact)
    with torch.cuda.device_of(frames):
        _gmm_log_likelihood_fwd_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
            frames,
            *outputs,
            operand.affine,
            operand.weight,
            operand.scale,
            operand.bias,
            operand.rows,
            operand.constant,
            T,
            *frames.stride(),
            1.0 / temperature,
            D=D,
            F=F,
            K_PAD=K_pad,
            BLOCK_F=BLOCK_F,
            EXACT=operand.exact,
            BEST=best,
            **tile,
        )
