"""Mixtures for tests."""

from __future__ import annotations

import torch

from gmm_jepa.ops import Mixture


def drawn(n, K, D, *, offset=0.0, variance=(0.1, 2.0), seed=0, dtype=torch.float32):
    """Frames (n, D) and the float64 mixture of K components that they are drawn from."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.05
    means = offset + 3.0 * torch.randn(K, D, generator=g, dtype=torch.float64)
    low, high = variance
    v = low + (high - low) * torch.rand(K, D, generator=g, dtype=torch.float64)
    k = torch.randint(K, (n,), generator=g)
    frames = means[k] + v[k].sqrt() * torch.randn(n, D, generator=g, dtype=torch.float64)
    return frames.to(dtype), Mixture((weights / weights.sum()).log(), means, v)
