"""Parts of the small conformer that are one operator on CPUs under autocast, beside torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import floors
from bench.cases import Case, worst
from bench.shapes import Shape
from gmm_jepa import flops
from gmm_jepa.models import ConformerConfig
from gmm_jepa.models.attention import GatedRelativeBias
from gmm_jepa.models.conformer import ConvolutionModule, FeedForward, SelfAttention
from gmm_jepa.models.frontend import FrontEnd
from gmm_jepa.ops import fused
from gmm_jepa.presets import MODELS

TOLERANCE = 0.05
"""Of the root of the mean square: values near the kink of a leaky ReLU may be rounded across it."""


def feed_forward(shape: Shape, device: str) -> Case:
    """Two maps and GELU."""
    config, x = _config(), _frames(shape, _config().code_dim)
    D, N = config.code_dim, x[..., 0].numel()
    return _part("feed_forward", FeedForward(D, 0.0), (x,), 3.0 * 2 * N * D * 8 * D)


def self_attention(shape: Shape, device: str) -> Case:
    """Maps, gates and attention."""
    config, x = _config(), _frames(shape, _config().code_dim)
    (B, T, D), H = x.shape, config.heads
    bias = GatedRelativeBias(
        H, D // H, n_buckets=config.n_buckets, max_distance=config.max_distance
    )
    module = SelfAttention(D, H, 0.0)
    module.bias = bias
    table = bias.table(T).detach()
    work = 3.0 * 2 * B * T * 4 * D * D + floors.attention(B, H, T, D // H).flops
    return _part("self_attention", module, (x,), work, lambda x: module(x, None, bias, table))


def convolution_module(shape: Shape, device: str) -> Case:
    """Norms, maps and taps."""
    config, x = _config(), _frames(shape, _config().code_dim)
    D, N = config.code_dim, x[..., 0].numel()
    module = ConvolutionModule(D, config.conv_kernel, 0.0)
    work = 3.0 * 2 * N * (3 * D * D + config.conv_kernel * D)
    return _part("convolution_module", module, (x,), work, lambda x: module(x, None))


def front_end(shape: Shape, device: str) -> Case:
    """All between the waveform and the first block."""
    config = _config()
    waveform = 0.1 * torch.randn(shape.rows, shape.samples)
    module = FrontEnd(config)
    work = 3.0 * shape.rows * flops.front_end_flops(config, shape.samples)
    return _part("front_end", module, (), work, lambda: module(waveform, None)[0])


def _config() -> ConformerConfig:
    return MODELS["conformer-cpu"]()


def _frames(shape: Shape, channels: int) -> Tensor:
    return torch.randn(shape.rows, shape.samples // 320, channels, requires_grad=True)


def _part(
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    n_flops: float,
    call: Callable[..., Tensor] | None = None,
) -> Case:
    leaves = (*inputs, *module.parameters())
    call = module if call is None else call

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*inputs)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        return [out, *(g for g in grads if g is not None)]

    def composed() -> list[Tensor]:
        with fused.composed():
            return run()

    def error() -> float:
        pairs = ((a.detach().float(), b.detach().float()) for a, b in zip(run(), composed()))
        return worst((a - b).norm() / b.norm() for a, b in pairs) / TOLERANCE

    least_bytes = 4.0 * sum(leaf.numel() for leaf in leaves)
    work = floors.Work(n_flops, least_bytes)
    name = f"{name} of the small conformer + gradient"
    return Case(name, "bf16", run, {"torch": composed}, error, work, "bfloat16")
