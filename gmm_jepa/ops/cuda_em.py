"""A mixture packed for the CUDA EM kernels of ``csrc/cuda`` and for their emulation.

The screen is a bfloat16 matrix product whose error is bounded; csrc/README.md derives the bound.
Packing is torch alone, on the mixture's device, and never waits for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.ops.mixture import Mixture

# Components further below a frame's best are left out: exp(-34) = 2e-15 of its weight each.
MARGIN_NATS = 34.0
# A bound looser than this, for a frame at a usual distance, finds nothing out.
LOOSEST_NATS = 40.0
# Precisions and slopes of standardised features beyond this could leave float32's range.
LARGEST_PRECISION = 1e30
# csrc/cuda/tile.h has the same two.
TILE_COMPONENTS = 64
STEP_DEPTH = 16


class Operands(NamedTuple):
    """What the kernels read, in the order of ``Operands`` in csrc/cuda/em.h; all contiguous."""

    weights: Tensor
    """(K padded to 64, 2 D padded to 16) bfloat16: slope and -precision / 2 of each feature, in the
    order of `even_first`"""
    bias: Tensor
    """(K padded,) float32; infinity where every frame computes the component, minus infinity where
    none does"""
    guess: Tensor
    """(K padded,) float32: bias over `guess_dims` features alone, minus infinity where the bias is
    not finite"""
    table: Tensor
    """(K, D, 2) float64: mean, 1 / variance"""
    constants: Tensor
    """(K,) float64: log-density of a frame on the mean"""
    shift: Tensor
    """(D,) float32"""
    inverse_scale: Tensor
    """(D,) float32: z = (x - shift) * inverse_scale"""
    gain: Tensor
    """() float64: how much the bound loosens per nat of a low best"""

    def addresses(self) -> tuple[int, ...]:
        """Of all fields, then K and D."""
        return (*(field.data_ptr() for field in self), len(self.constants), len(self.shift))


def pack(mixture: Mixture) -> Operands:
    """Fold a mixture in float64 and round it, with the bound of what rounding does in its bias.

    Args:
        mixture: K >= 1 components of D >= 1 features.
    """
    log_weights, means, variances = (p.detach().double() for p in mixture)
    K, D = means.shape
    share = torch.softmax(log_weights, 0)
    shift = (share[:, None] * means).sum(0).float()
    spread = (share[:, None] * (variances + (means - shift).square())).sum(0)
    inverse_scale = spread.rsqrt().float()
    constants = log_weights - 0.5 * (variances.log().sum(1) + D * math.log(2.0 * math.pi))
    scale = inverse_scale.double()
    mu, precision = (means - shift) * scale, 1.0 / (variances * scale.square())
    precision_hat = precision.to(torch.bfloat16)
    slope = (precision_hat.double() * mu).to(torch.bfloat16)
    bias, squares, loose, gain = _bound(constants, share, mu, precision, precision_hat, slope)

    usable = torch.isfinite(shift) & (inverse_scale > 1e-30) & (inverse_scale < 1e30)
    in_range = torch.maximum(precision, slope.double().abs()).amax(1) < LARGEST_PRECISION
    usual = D + 2.0 * MARGIN_NATS
    screened = (loose + 0.5 * gain * usual <= LOOSEST_NATS) & in_range & usable.all()
    out = log_weights == -math.inf
    lift = loose + gain * constants
    lifted = bias + lift + 2.0 * _summation(D) * lift.abs()

    padded = -(-K // TILE_COMPONENTS) * TILE_COMPONENTS
    weights = means.new_zeros(padded, -(-2 * D // STEP_DEPTH) * STEP_DEPTH, dtype=torch.bfloat16)
    keep = screened & ~out
    weights[:K, 0 : 2 * D : 2] = torch.where(keep[:, None], even_first(slope), 0.0)
    weights[:K, 1 : 2 * D : 2] = torch.where(keep[:, None], -0.5 * even_first(precision_hat), 0.0)
    terms = variances.log() + math.log(2.0 * math.pi) + squares
    marginal = log_weights - 0.5 * even_first(terms)[:, : guess_dims(D)].sum(1)
    biases, guess = means.new_full((2, padded), -math.inf, dtype=torch.float32)
    biases[:K] = torch.where(keep, lifted, torch.where(out, -math.inf, math.inf)).float()
    guess[:K] = torch.where(keep, marginal, -math.inf).float()
    table = torch.stack((means, 1.0 / variances), 2).contiguous()
    return Operands(weights, biases, guess, table, constants, shift, inverse_scale, gain)


def even_first(features: Tensor) -> Tensor:
    """(K, D) as `feature_position` in csrc/cuda/tile.h has them: 0, 2, ..., 1, 5, ..., 3, 7, ..."""
    return torch.cat((features[:, ::2], features[:, 1::4], features[:, 3::4]), 1)


def guess_dims(D: int) -> int:
    """How many features, in that order, the first sweep reads: two thirds of the steps."""
    steps = -(-2 * D // STEP_DEPTH)
    return min(D, (2 * steps + 2) // 3 * STEP_DEPTH // 2)


def _summation(D: int) -> float:
    """What a sum of 2 D float32 terms in a tensor core is off by, of the sum of magnitudes.

    An mma may cut its 16 terms and its sum to 24 bits of the largest of them: 17 times 2^-23 for
    16 terms. Twice that is taken.
    """
    return 2.0**-22 * (17.0 / 16.0 * 2.0 * D + 32.0)


def _bound(
    constants: Tensor,
    share: Tensor,
    mu: Tensor,
    precision: Tensor,
    precision_hat: Tensor,
    slope: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bias (K,), its p^ mu^^2 (K, D), the component's share of the error (K,) and the frames' ().

    With Q = sum p (z - mu)^2, error <= alpha + beta sqrt(Q) + gamma Q, and 2 beta sqrt(Q) <= theta
    beta^2 + Q / theta, with equality at the usual distance, parts it into the two.
    """
    D = mu.shape[1]
    u, nu = 2.0**-8 + 2.0**-21, _summation(D)
    of_square = u * (1.0 + u) ** 3
    gamma = 0.5 * ((1.0 + u) ** 3 - 1.0 + of_square) + 0.53 * nu
    p_hat = precision_hat.double()
    mu_hat = slope.double() / p_hat  # infinite or not a number where the precision underflows
    square = (precision * mu.square()).sum(1)
    h = u * square.sqrt() + (precision * (mu_hat - mu).square()).sum(1).sqrt()
    squares = p_hat * mu_hat.square()
    bias = constants - 0.5 * squares.sum(1)
    alpha = 0.5 * (1.0 + u) * h.square() + 0.5 * of_square * square
    alpha = alpha + nu * (2.0 * bias.abs() + 1.6 * square) + 1e-6
    beta = (1.0 + u) ** 2 * h + (of_square + 2.1 * nu) * square.sqrt()
    usual = math.sqrt(D + 2.0 * MARGIN_NATS)
    weight = torch.where(torch.isfinite(alpha + beta) & (share > 0.0), share, 0.0)
    mean_beta = (weight * beta.nan_to_num()).sum() / weight.sum()
    theta = torch.where(weight.sum() > 0.0, usual / mean_beta.clamp_min(1e-12), 1.0)
    return bias, squares, alpha + 0.5 * theta * beta.square(), 2.0 * gamma + 1.0 / theta
