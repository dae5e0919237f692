"""Mixtures and frames that measurements draw where there is no speech.

What exact EM and posteriors cost depends on how many components lie near a frame. Means along a few
dimensions, and a little off them, overlap about as those of a mixture fitted to speech: of 1,024
components 9 lie within 34 nats of a frame's best, and 14 within 38.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmm_jepa.ops import Mixture

LATENT, NEAR, FAR = 6, 0.3, 1.0
"""Dimensions that means lie along, how far they stray from these, how far they spread on them."""


def overlapping(K: int, D: int, generator: torch.Generator) -> Mixture:
    """K components of D features, float64, equal weights, on the generator's device."""
    options = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    means = torch.randn(K, LATENT, **options) @ torch.randn(LATENT, D, **options)
    means = FAR / math.sqrt(LATENT) * means + NEAR * torch.randn(K, D, **options)
    variances = 0.1 + 2.0 * torch.rand(K, D, **options)
    return Mixture(torch.full_like(means[:, 0], -math.log(K)), means, variances)


def frames_of(mixture: Mixture, n: int, generator: torch.Generator) -> Tensor:
    """Frames (n, D) float32 drawn from components of equal weights, on their device."""
    K, D = mixture.means.shape
    device = mixture.means.device
    k = torch.randint(K, (n,), generator=generator, device=device)
    noise = torch.randn(n, D, generator=generator, device=device)
    return mixture.means.float()[k] + mixture.variances.float().sqrt()[k] * noise


def on_borders(mixture: Mixture, n: int, generator: torch.Generator) -> Tensor:
    """Frames (n, D) float32 to which a component and its neighbour are equally probable.

    Nowhere else do small errors show as much in a posterior.
    """
    means, variances = mixture.means.double(), mixture.variances.double()
    first = torch.randint(len(means), (n,), generator=generator, device=means.device)
    distances = torch.cdist(means[first], means).scatter_(1, first[:, None], math.inf)
    second = distances.argmin(dim=1)
    far = torch.ones(n, 1, dtype=torch.float64, device=means.device)
    near = torch.zeros_like(far)

    def log_density(x: Tensor, k: Tensor) -> Tensor:
        terms = variances[k].log() + (x - means[k]).square() / variances[k]
        return mixture.log_weights.double()[k, None] - 0.5 * terms.sum(dim=1, keepdim=True)

    for _ in range(40):
        middle = (near + far) / 2
        x = torch.lerp(means[first], means[second], middle)
        is_first = log_density(x, first) > log_density(x, second)
        near, far = torch.where(is_first, middle, near), torch.where(is_first, far, middle)
    return x.float()
