"""A diagonal mixture in plain float32 torch, chunk by chunk, as a competent user would write it.

Log-densities of a chunk are one matrix product of standardised [x, x^2] with packed parameters,
responsibilities a softmax, and the moments a second product. float32 throughout; nothing is left
out and nothing is computed twice. On a CPU denormal responsibilities halve its speed unless they
are flushed to zero (`torch.set_flush_denormal`), as the measurements do for all sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_FRAMES = 1024
"""The fastest of 256 to 8,192 on two cores: what a chunk makes stays in cache."""


class ChunkedMixture:
    """Parameters packed once for the products.

    Args:
        log_weights: (K,)
        means: (K, D)
        variances: (K, D)
        chunk_frames: worked on at a time.
    """

    def __init__(
        self,
        log_weights: Tensor,
        means: Tensor,
        variances: Tensor,
        *,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> None:
        self.chunk_frames = chunk_frames
        share = log_weights.exp()[:, None]
        self.centre = (share * means).sum(0)
        self.scale = (share * (variances + (means - self.centre).square())).sum(0).sqrt()
        m = (means - self.centre) / self.scale
        precision = self.scale.square() / variances
        constant = log_weights - 0.5 * (
            (2 * math.pi * variances).log().sum(1) + (m.square() * precision).sum(1)
        )
        self.weight = torch.cat([m * precision, -0.5 * precision], dim=1).T.float().contiguous()
        self.bias = constant.float()
        self.centre, self.scale = self.centre.float(), self.scale.float()

    def features(self, frames: Tensor) -> Tensor:
        """(n, D) -> (n, 2 D), standardised x and its square."""
        z = (frames - self.centre) / self.scale
        return torch.cat([z, z.square()], dim=1)

    def posteriors(self, frames: Tensor) -> Tensor:
        """(N, D) float32 -> (N, K) float32."""
        out = frames.new_empty(len(frames), len(self.bias))
        for rows, chunk in zip(out.split(self.chunk_frames), frames.split(self.chunk_frames)):
            torch.addmm(self.bias, self.features(chunk), self.weight, out=rows)
            rows.copy_(torch.softmax(rows, dim=1))
        return out

    def statistics(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, D) float32 -> counts (K,), first (K, D), second (K, D), log-likelihood (), of z."""
        K, D = len(self.bias), frames.shape[1]
        counts, moments = frames.new_zeros(K), frames.new_zeros(K, 2 * D)
        log_likelihood = frames.new_zeros((), dtype=torch.float64)
        for chunk in frames.split(self.chunk_frames):
            features = self.features(chunk)
            joint = torch.addmm(self.bias, features, self.weight)
            responsibilities = torch.softmax(joint, dim=1)
            top, best = joint.max(dim=1, keepdim=True)  # cheaper than a logsumexp
            log_likelihood += (top - responsibilities.gather(1, best).log()).double().sum()
            counts += responsibilities.sum(0)
            moments.addmm_(responsibilities.T, features)
        n = counts[:, None]
        z1, z2 = moments[:, :D] * self.scale, moments[:, D:] * self.scale.square()
        first = n * self.centre + z1
        second = n * self.centre.square() + 2 * self.centre * z1 + z2
        return counts, first, second, log_likelihood
