"""Each CUDA kernel once at a tiny, ragged shape, for tools that slow a program down a lot.

    compute-sanitizer --tool memcheck python -m bench.tiny

It measures nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

import torch

from bench.cases import mixture_of
from bench.records import need_device
from bench.shapes import Shape
from gmm_jepa import LogMelSpec, ops
from gmm_jepa.models.daam import DensityAttention
from gmm_jepa.models.frontend import ResidualBlock, Snake
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.ops import native, native_mixture


def attend(device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Attention of ragged rows, one of no keys, forward and backward, with dropout and without."""
    B, H, T = 3, 2, 70
    q = torch.randn(3, B, H, T, head_dim, device=device, dtype=dtype)
    table, gate = torch.randn(H, 2 * T - 1, device=device), torch.rand(B, H, T, device=device)
    leaves = [t.requires_grad_() for t in (*q.unbind(), table, gate.to(dtype))]
    lengths = torch.tensor([70, 0, 33], device=device)
    for dropout_p in (0.0, 0.1):
        y = ops.gated_bias_attention(*leaves, key_lengths=lengths, dropout_p=dropout_p)
        y.float().sum().backward()


def convolve(device: str, dtype: torch.dtype, channels: int) -> None:
    """The depthwise convolution of rows longer and shorter than a tile, forward and backward."""
    weight = torch.randn(channels, 1, 31, device=device, requires_grad=True)
    bias = torch.zeros(channels, device=device, requires_grad=True)
    for n_frames in (133, 7):
        x = torch.randn(2, n_frames, channels, device=device, dtype=dtype, requires_grad=True)
        ops.depthwise_conv(x, weight, bias).float().sum().backward()


def front_end(device: str) -> None:
    """Layers of a front end's stages of ragged rows, forward and backward, under autocast.

    By Triton kernels with ``GMM_JEPA_UNPROVEN_KERNELS=1``, else by plain torch.
    """
    for channels in (48, 64, 256):
        layers = (ResidualBlock(channels, (1, 25)), Snake(channels), DensityAttention())
        for n_frames in (133, 16):
            lengths = torch.tensor([n_frames, 0, n_frames // 2], device=device)
            for layer in layers:
                x = torch.randn(3, n_frames, channels, device=device, requires_grad=True)
                with torch.autocast(device, torch.bfloat16):
                    mask = frame_mask(lengths, n_frames)
                    y = layer.to(device)(x.bfloat16(), mask)
                y.float().sum().backward()


def accumulate(device: str) -> None:
    """EM by the native module's CUDA kernels, where it has them: both screens, soft and hard."""
    if device != "cuda" or not native.cuda_architectures():
        return
    N, K, D = 215, 130, 80
    means = torch.randn(K, D, device=device, dtype=torch.float64)
    frames = means.float()[torch.arange(N, device=device) % K]
    frames += torch.randn(N, D, device=device)
    mixture = (torch.full_like(means[:, 0], 1.0 / K).log(), means, torch.ones_like(means))
    for unproven in ("0", "1"):  # read at every call
        with mock.patch.dict(os.environ, {"GMM_JEPA_UNPROVEN_KERNELS": unproven}):
            for hard in (False, True):
                counts, *_ = native_mixture.em_statistics_cuda(frames, *mixture, hard)
                if not (counts.sum() - N).abs() < 1e-6 * N:
                    raise SystemExit(f"counts sum to {counts.sum()}, not {N}")


def run(device: str) -> None:
    """Run them and wait."""
    torch.manual_seed(0)
    spec = LogMelSpec()
    lengths = torch.tensor([1501, 0, 37], device=device)
    waveform = 0.1 * torch.randn(3, 1501, device=device)
    tables = spec.window(device), spec.filters(device)
    frames = ops.log_mel(waveform, lengths, *tables, hop=320, floor=1e-6).flatten(0, 1)
    N, K = len(frames), 37
    mixture = mixture_of(Shape(rows=1, seconds=1.0, components=K), device)
    fine = ops.Mixture(*(p.double() for p in mixture))
    both = ops.Ensemble((mixture, mixture), (0.5, 0.5))
    for precision in ("fast", "exact"):
        for log in (False, True):
            ops.gmm_posterior(frames, mixture, precision=precision, log=log)
        ops.gmm_log_likelihood(frames, mixture, precision=precision)
        ops.gmm_posterior(frames, both, precision=precision)
    ops.gmm_posterior(frames, fine, precision="exact")
    ops.gmm_log_likelihood(frames, fine)
    for parameters in (mixture, fine, both):
        for k in (1, 3):
            ops.gmm_topk(frames, parameters, k)
    ops.gmm_log_likelihood(frames, both)
    weights = (torch.arange(N, device=device) % 3 == 0).float()
    logits = torch.randn(N, K, device=device, requires_grad=True)
    targets = torch.randn(N, K, device=device).softmax(1)
    ops.masked_kl(logits, frames, weights, mixture).loss.backward()
    with torch.no_grad():
        ops.masked_kl(logits, frames, weights, mixture)
    ops.masked_kl(logits, frames, weights, both).loss.backward()
    ops.masked_kl_targets(logits, targets, weights).loss.backward()
    ops.masked_cross_entropy(logits, targets.argmax(1), weights).loss.backward()
    ops.masked_mse(logits, targets, weights).backward()
    for dtype, head_dim in ((torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 64)):
        attend(device, dtype, head_dim)
    for dtype, channels in ((torch.float32, 37), (torch.bfloat16, 64), (torch.bfloat16, 100)):
        convolve(device, dtype, channels)
    ops.ema_update([targets, frames], [targets + 1.0, frames + 1.0], 0.996)
    front_end(device)
    accumulate(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    need_device(options.device)
    run(options.device)


if __name__ == "__main__":
    main()
