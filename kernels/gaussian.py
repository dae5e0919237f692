"""Log-density of a tile of frames under a block of Gaussians, shared by the mixture's kernels.

    log p(x, k) = log w_k - 1/2 sum_d [log(2 pi v_kd) + (x_d - m_kd)^2 / v_kd]

Split form (fast): ``[z, z^2] @ weight + bias`` with ``z = (x - centre) * inverse_scale``, on
tensor cores. Both factors are scaled by powers of two (features per frame, weights per component)
and split into two float16 of 11 bits each; three products of the parts give 22 bits, those of
tf32x3 at the rate of float16. The scales keep any finite mixture and frame within float16's range.

Direct form (exact): ``bias - sum_d (x - m)^2 * h`` with h = 1 / (2 v): no cancellation, so float32
serves for the terms and their sums over 16 features, and float64 for the sum of those sums. Means
of a float64 mixture are two float32, 48 bits, subtracted one after the other. Features are brought
into float32's range by powers of two, which rounds nothing.

Source: gmm_jepa.ops.mixture folds the mixture; the split is that of Ootomo and Yokota,
"Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_F = 32  # features a step; 2 D = 160 at D = 80 is five of them, with nothing wasted
DIRECT_STEP = tl.constexpr(16)  # features summed in float32 before float64 takes over
LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where 0 * infinity would make a NaN


class Operand(NamedTuple):
    """A mixture as the kernels read it: 2 D features padded to F, a multiple of BLOCK_F
    (direct form: D, of DIRECT_STEP), components to K', see `padded_components`."""

    affine: Tensor
    """(2, F) float32: centre and inverse scale of each feature; direct form (F,): powers of two"""
    weight: Tensor
    """(2, F, K') float16: high and low part; direct form float32: 1 / (2 v), then the parts of m,
    (2 or 3, F, K')"""
    scale: Tensor
    """(K',) float32, powers of two that undo the weights' scaling (split form)"""
    bias: Tensor
    """(K',) float32, at least `LOWEST`, which stands for the padding; direct form float64"""
    rows: Tensor
    """(K, 2, D) float32, of standardised features: m and sqrt(1 / (2 v)) (split form)"""
    constant: Tensor
    """(K,) float32: log w - 1/2 sum log(2 pi v) (split form)"""
    exact: int
    """0: split form; 1 or 2: direct form, with means of so many parts"""


def padded_components(n_components: int) -> int:
    """K': a power of two from 16 to 128, or a multiple of 128."""
    if n_components > 128:
        return triton.cdiv(n_components, 128) * 128
    return max(16, triton.next_power_of_2(n_components))


def split_operand(
    centre: Tensor, inverse_scale: Tensor, weight: Tensor, bias: Tensor, constant: Tensor
) -> Operand:
    """Pack the quadratic form: centre, inverse_scale (D,), weight (2 D, K), bias (K,), float32.

    `constant` (K,) float64 is log w - 1/2 sum log(2 pi v).
    """
    n_features, K = weight.shape
    F, K_pad = triton.cdiv(n_features, BLOCK_F) * BLOCK_F, padded_components(K)
    affine = weight.new_zeros(2, F)
    affine[:, :n_features] = torch.stack((centre.repeat(2), inverse_scale.repeat(2)))
    exponent = torch.frexp(weight.abs().amax(0)).exponent - 8  # largest weight: 2^7 to 2^8
    scaled = weight.new_zeros(F, K_pad)
    scaled[:n_features, :K] = torch.ldexp(weight, -exponent)
    high = scaled.half()
    parts = torch.stack((high, (scaled - high.float()).half()))
    scale = weight.new_ones(K_pad)
    scale[:K] = torch.ldexp(weight.new_ones(K), exponent)
    linear, square = weight.T.double().split(n_features // 2, dim=1)  # m / v and -1 / (2 v)
    half_precision = square.neg().clamp_min(1e-38)
    rows = torch.stack((0.5 * linear / half_precision, half_precision.sqrt()), 1).float()
    return Operand(
        affine,
        parts,
        scale,
        _padded_bias(bias, K_pad),
        rows,
        constant.clamp_min(LOWEST.value).float(),
        exact=0,
    )


def direct_operand(means: Tensor, variances: Tensor, constant: Tensor) -> Operand:
    """Pack means, variances (K, D), constant (K,) float64 = log w - 1/2 sum log(2 pi v)."""
    K, D = means.shape
    n_parts = 2 if means.dtype == torch.float64 else 1
    F = triton.cdiv(D, DIRECT_STEP.value) * DIRECT_STEP.value
    exponent = torch.frexp(variances.double().amin(0)).exponent.div(2, rounding_mode="floor")
    shrink = _power_of_two(-exponent.clamp(-120, 120))
    affine = means.new_ones(F, dtype=torch.float32)
    affine[:D] = shrink
    weight = affine.new_zeros(1 + n_parts, F, padded_components(K))
    weight[0, :D, :K] = (0.5 / (variances.double() * shrink.square())).T
    rest = (means.double() * shrink).T
    for part in weight[1:]:
        part[:D, :K] = rest
        rest = rest - part[:D, :K].double()
    nothing = affine.new_empty(1)
    bias = _padded_bias(constant, weight.shape[2])
    return Operand(affine, weight, nothing, bias, nothing, nothing, exact=n_parts)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float64, made of its bits: `torch.ldexp` makes it in float32."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _padded_bias(bias: Tensor, n_padded: int) -> Tensor:
    padded = bias.new_full((n_padded,), LOWEST.value)
    padded[: bias.shape[0]] = bias.clamp_min(LOWEST.value)
    return padded


@triton.jit
def _features(
    x_ptr,
    rows,
    mask_t,
    stride_x_t,
    stride_x_d,
    affine_ptr,
    offs_f,
    D: tl.constexpr,
    F: tl.constexpr,
):
    """[z, z^2] of a tile: (BLOCK_T, BLOCK_F) float32; rows int64, 0 past 2 D."""
    offs_d = tl.where(offs_f < D, offs_f, offs_f - D)
    mask = mask_t[:, None] & (offs_f < 2 * D)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_x_t + offs_d.to(tl.int64)[None, :] * stride_x_d
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(affine_ptr + offs_f)
    inverse_scale = tl.load(affine_ptr + F + offs_f)
    z = (x - centre[None, :]) * inverse_scale[None, :]
    return tl.where((offs_f < D)[None, :], z, z * z)


@triton.jit
def row_scale(
    x_ptr,
    rows,
    mask_t,
    stride_x_t,
    stride_x_d,
    affine_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(BLOCK_T,) power of two: a frame's largest feature divided by it is 2^8 to 2^9."""
    largest = tl.full((BLOCK_T,), 7.9e-31, dtype=tl.float32)  # 2^-100: scales stay normal numbers
    if not EXACT:
        for f0 in range(0, F, BLOCK_F):
            offs_f = f0 + tl.arange(0, BLOCK_F)
            features = _features(
                x_ptr, rows, mask_t, stride_x_t, stride_x_d, affine_ptr, offs_f, D, F
            )
            largest = tl.maximum(largest, tl.max(tl.abs(features), 1))
    exponent = tl.minimum(largest, 1.2e30).to(tl.int32, bitcast=True) & 0x7F800000
    return (exponent - (8 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log_joint(
    x_ptr,
    rows,
    mask_t,
    stride_x_t,
    stride_x_d,
    scale_t,
    affine_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    offs_k,
    inverse_temperature,
    D: tl.constexpr,
    F: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EXACT: tl.constexpr,
):
    """log p(x, k) / temperature: (BLOCK_T, BLOCK_K) float32, or float64 if EXACT.

    `scale_t` comes from `row_scale`; EXACT is `Operand.exact`.
    """
    bias = tl.load(bias_ptr + offs_k) * inverse_temperature
    bias = tl.maximum(bias, LOWEST)[None, :]
    if EXACT:
        total = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float64)
        for d0 in range(0, F, DIRECT_STEP):
            part = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
            for d in range(d0, d0 + DIRECT_STEP):
                x_ptrs = x_ptr + rows * stride_x_t + tl.cast(d, tl.int64) * stride_x_d
                x = tl.load(x_ptrs, mask=mask_t & (d < D), other=0.0).to(tl.float32)
                x *= tl.load(affine_ptr + d)
                half_precision = tl.load(weight_ptr + d * K_PAD + offs_k)
                mean = tl.load(weight_ptr + (F + d) * K_PAD + offs_k)
                distance = x[:, None] - mean[None, :]
                if EXACT == 2:
                    rest = tl.load(weight_ptr + (2 * F + d) * K_PAD + offs_k)
                    distance -= rest[None, :]
                part += distance * distance * half_precision[None, :]
            total += part.to(tl.float64)
        result = bias - total * inverse_temperature
    else:
        total = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
        inverse_scale_t = ((254 << 23) - scale_t.to(tl.int32, bitcast=True)).to(
            tl.float32, bitcast=True
        )
        for f0 in range(0, F, BLOCK_F):
            offs_f = f0 + tl.arange(0, BLOCK_F)
            features = _features(
                x_ptr, rows, mask_t, stride_x_t, stride_x_d, affine_ptr, offs_f, D, F
            )
            features = features * inverse_scale_t[:, None]
            high = features.to(tl.float16)  # (BLOCK_T, BLOCK_F)
            low = (features - high.to(tl.float32)).to(tl.float16)
            weight_ptrs = weight_ptr + offs_f[:, None] * K_PAD + offs_k[None, :]
            weight_high = tl.load(weight_ptrs)  # (BLOCK_F, BLOCK_K)
            weight_low = tl.load(weight_ptrs + F * K_PAD)
            total = tl.dot(low, weight_high, total)
            total = tl.dot(high, weight_low, total)
            total = tl.dot(high, weight_high, total)
        scale_k = tl.load(scale_ptr + offs_k) * inverse_temperature
        result = total * scale_t[:, None] * scale_k[None, :] + bias
    return result


@triton.jit
def log_joint_of(
    x_ptr,
    rows,
    mask_t,
    stride_x_t,
    stride_x_d,
    component,
    affine_ptr,
    rows_ptr,
    constant_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """log p(x, k) of one component a frame, in the direct form: (BLOCK_T,) float32."""
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for f0 in range(0, D, BLOCK_F):
        offs_f = f0 + tl.arange(0, BLOCK_F)
        z = _features(x_ptr, rows, mask_t, stride_x_t, stride_x_d, affine_ptr, offs_f, D, F)
        mask = mask_t[:, None] & (offs_f < D)[None, :]
        m_ptrs = rows_ptr + component[:, None] * (2 * D) + offs_f[None, :]
        mean = tl.load(m_ptrs, mask=mask, other=0.0)
        distance = (z - mean) * tl.load(m_ptrs + D, mask=mask, other=0.0)
        total += tl.sum(distance * distance, 1)
    return tl.load(constant_ptr + component) - total
