"""Collapse meters: is the embedding still using its dimensions, and the head its clusters?

They warn, they do not judge: an untrained network has the highest effective rank of all. Read them
beside the KL, the usage entropy and a probe.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def embedding_meters(z: Tensor) -> dict[str, Tensor]:
    """Spread of a set of embeddings, in O(N D^2 + D^3) time and O(D^2) extra memory in N.

    - ``std``: standard deviation (divisor n), averaged over the dimensions; 0 is a collapse.
    - ``effective_rank``: exp of the entropy of the normalised singular values of the centred
      embeddings (Roy and Vetterli, 2007), from 1 to D; 0 where nothing varies. The singular values
      are square roots of the eigenvalues of the float64 covariance.
    - ``mean_cosine``: mean cosine over all pairs of different rows; 1 is a collapse. By
      ``|sum u|^2 = sum_ij u_i.u_j`` it needs no pairs. A row of zeros has cosine 0 with all.

    Nothing is read back to the host here, but PyTorch's eigenvalue routine checks its own success
    on the host: on CUDA, call this only where the step waits for the device anyway.

    Args:
        z: (N, D) embeddings, any float type and device; N may be 0 or 1.

    Returns:
        Three 0-d float32 tensors on z's device. NaN where a row is not finite; 0 where
        there are too few rows (one for std and rank, two for the cosine).
    """
    if z.ndim != 2:
        raise ValueError(f"z: expected shape (N, D), got {tuple(z.shape)}")
    rows = z.detach().double()
    n = len(rows)

    centred = rows - rows.sum(0) / max(n, 1)
    covariance = centred.T @ centred / max(n, 1)
    std = covariance.diagonal().clamp(min=0).sqrt().mean()

    norms = rows.norm(dim=1, keepdim=True)
    units = torch.where(norms == 0, 0.0, rows / norms)  # NaN stays NaN
    itself = units.square().sum()
    cosine = (units.sum(0).square().sum() - itself) / max(n * (n - 1), 1)
    cosine = cosine if n > 1 else torch.zeros_like(cosine)

    # Rounding leaves variances near 1e-32 of the mean square where rows are equal: not a rank.
    rank = _effective_rank(covariance, 1e-24 * rows.square().mean(1).sum() / max(n, 1))
    meters = {"std": std, "effective_rank": rank, "mean_cosine": cosine}
    return {name: value.float() for name, value in meters.items()}


def _effective_rank(covariance: Tensor, floor: Tensor) -> Tensor:
    """exp H(s / sum s) of s = sqrt(eigenvalues above the floor); (D, D), () float64 -> ()."""
    finite = covariance.isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, covariance, 0.0)).clamp(min=0)
    floor = torch.maximum(1e-13 * eigenvalues.amax(), floor)
    eigenvalues = torch.where(eigenvalues > floor, eigenvalues, 0.0)
    singular = eigenvalues.sqrt()
    total = singular.sum()
    shares = singular / torch.where(total > 0, total, 1.0)
    rank = torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)
    return torch.where(finite, rank, torch.nan)


def usage_entropy(counts: Tensor) -> Tensor:
    """Entropy of cluster usage, divided by log K: 1 is even use, 0 a single cluster.

    Args:
        counts: (K,) non-negative counts or summed posteriors, any type.

    Returns:
        0-d float32 tensor in [0, 1] on the device of `counts`; 0 where K < 2 or nothing is counted.
    """
    if counts.ndim != 1:
        raise ValueError(f"counts: expected shape (K,), got {tuple(counts.shape)}")
    weights = counts.detach().double()
    if len(weights) < 2:
        return torch.zeros((), device=counts.device)
    total = weights.sum()
    shares = weights / torch.where(total > 0, total, 1.0)
    return (torch.special.entr(shares).sum() / math.log(len(weights))).clamp(0, 1).float()
