"""Each CUDA kernel once at a tiny, ragged shape, for tools that slow a program down a lot.

compute-sanitizer --tool memcheck python -m bench.tiny
"""

from __future__ import annotations

import torch

from bench.cases import mixture_of
from bench.shapes import Shape
from gmm_jepa import LogMelSpec, ops


def main(device: str = "cuda") -> None:
    """Run them and wait."""
    torch.manual_seed(0)
    spec = LogMelSpec()
    lengths = torch.tensor([1501, 0, 37], device=device)
    waveform = 0.1 * torch.randn(3, 1501, device=device)
    tables = spec.window(device), spec.filters(device)
    frames = ops.log_mel(waveform, lengths, *tables, hop=320, floor=1e-6).flatten(0, 1)
    N, K = len(frames), 37
    mixture = mixture_of(Shape(rows=1, seconds=1.0, components=K), device)
    ops.gmm_posterior(frames, mixture)
    ops.gmm_posterior(frames, mixture, precision="exact")
    ops.gmm_log_likelihood(frames, mixture)
    weights = (torch.arange(N, device=device) % 3 == 0).float()
    logits = torch.randn(N, K, device=device, requires_grad=True)
    targets = torch.randn(N, K, device=device).softmax(1)
    ops.masked_kl(logits, frames, weights, mixture).loss.backward()
    both = ops.Ensemble((mixture, mixture), (0.5, 0.5))
    ops.masked_kl(logits, frames, weights, both).loss.backward()
    ops.masked_kl_targets(logits, targets, weights).loss.backward()
    ops.masked_cross_entropy(logits, targets.argmax(1), weights).loss.backward()
    ops.masked_mse(logits, targets, weights).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
