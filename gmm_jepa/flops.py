"""Operations of a training step and of its parts, as functions of shape.

A multiplication and an addition count as two, in matrix products and convolutions; elementwise
work, small beside them, is left out. Importing this tells PyTorch's `FlopCounterMode` what the
package's operators do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from gmm_jepa.models.build import EncoderConfig
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.padding import conv_length
from gmm_jepa.models.transformer import KERNELS, STRIDES, TransformerConfig
from gmm_jepa.ops.flop_formulas import FORMULAS


class LogMelFlops(NamedTuple):
    """Operations of one log-mel frame by part."""

    transform: float
    mel: float


def log_mel_frame(n_fft: int = 400, *, folds: int = 1) -> LogMelFlops:
    """Operations of one frame.

    Args:
        n_fft: samples of a frame, even.
        folds: 1, the transform as a matrix product folded by the signal's symmetry: even and odd
            parts against n_fft / 2 + 1 bins. 2, also folded over bins k and n_fft / 2 - k, as the
            CUDA kernel does it. 0, a fast Fourier transform, 5/2 n log2 n, as the CPU does it.
    """
    n_bins = n_fft // 2 + 1
    if folds == 0:
        transform = 2.5 * n_fft * math.log2(n_fft)
    else:
        even, odd = n_bins, n_bins - 2
        transform = 2.0 * (even + odd) * n_bins / 2 ** (folds - 1)
    return LogMelFlops(transform, 2.0 * 2 * n_bins)  # two overlapping filters at each bin


def log_density_flops(n_components: int = 1024, n_features: int = 80) -> float:
    """Of all components for one frame, as the product ``[x, x^2] @ [2 D, K]``."""
    return 2.0 * (2 * n_features) * n_components


def front_end_flops(config: EncoderConfig, n_samples: int) -> float:
    """Waveform of one row to frames: the strided convolutions and the projection, forward.

    The conformer's input convolution and its first strided one count as the one convolution they
    are run as.
    """
    if isinstance(config, TransformerConfig):
        return _convolution_stack_flops(config, n_samples)
    flops, n_frames = 0.0, n_samples
    for i, stride in enumerate(config.strides):
        c_in, c_out = config.channels[i], config.channels[i + 1]
        n_frames = (n_frames + 2 * (stride // 2) - 2 * stride) // stride + 1
        taps = (2 * stride + 6) if i == 0 else 2 * stride * c_in
        convolutions = config.residual_blocks * 3 * 2  # 3 dilations, each a pair of kernel 3
        flops += 2.0 * n_frames * (taps * c_out + convolutions * 3 * c_out**2)
    return flops + 2.0 * n_frames * config.channels[-1] * config.code_dim


def _convolution_stack_flops(config: TransformerConfig, n_samples: int) -> float:
    flops, n_frames, c_in = 0.0, n_samples, 1
    for kernel, stride in zip(KERNELS, STRIDES):
        n_frames = conv_length(n_frames, kernel, stride=stride)
        flops += 2.0 * n_frames * kernel * c_in * config.conv_dim
        c_in = config.conv_dim
    return flops + 2.0 * n_frames * config.conv_dim * config.code_dim


def block_flops(config: EncoderConfig, n_frames: int) -> float:
    """One block of the encoder over one row of so many frames, forward."""
    D = config.code_dim
    attention = 2 * n_frames * D
    if isinstance(config, TransformerConfig):
        return 2.0 * n_frames * (4 * D * D + 2 * D * config.ffn_dim + attention)
    linear = 2 * (2 * 4 * D * D) + 4 * D * D + 3 * D * D  # two feed-forwards, attention, conv
    attention += 2 * D if config.relative_bias else 0
    return 2.0 * n_frames * (linear + attention + config.conv_kernel * D)


def encoder_flops(config: EncoderConfig, n_samples: int) -> float:
    """One row through the encoder, forward."""
    n_frames = max(0, int(config.n_frames(n_samples)))
    aggregates = isinstance(config, ConformerConfig) and config.aggregation == "attention"
    aggregation = 2.0 * config.code_dim**2 * (config.layers + 2) if aggregates else 0.0
    blocks = config.layers * block_flops(config, n_frames)
    return front_end_flops(config, n_samples) + blocks + aggregation


def predictor_flops(config: EncoderConfig, n_frames: int) -> float:
    """Predictor over one row of so many frames, forward."""
    block = block_flops(config, n_frames) if isinstance(config, ConformerConfig) else 0.0
    return 2.0 * n_frames * 2 * config.code_dim**2 + block


def cluster_head_flops(
    config: EncoderConfig, n_frames: int, n_clusters: int, *, kind: str = "mlp"
) -> float:
    """Cluster head ("mlp", "linear" or "none") over one row of so many frames, forward."""
    D, width = config.code_dim, 2 * config.code_dim
    weights = {
        "mlp": D * width + 3 * 2 * width * width + width * n_clusters,
        "linear": D * n_clusters,
        "none": 0,
    }
    return 2.0 * n_frames * weights[kind]


def training_step_flops(
    config: EncoderConfig,
    n_samples: int,
    *,
    n_rows: int = 1,
    n_clusters: int = 1024,
    cluster_head: str = "mlp",
    predicts: bool = True,
    teaches: bool = True,
    recomputes_blocks: bool = False,
) -> float:
    """One step over so many rows of equal length: forward, backward (twice forward), teacher.

    Log-mel, posteriors and losses are in it too; the optimiser's elementwise work is not.

    Args:
        config: of the encoder.
        n_samples: of a row.
        n_rows: rows.
        n_clusters: K.
        cluster_head: its kind, see `cluster_head_flops`.
        predicts: there is a predictor.
        teaches: there is a teacher.
        recomputes_blocks: the backward pass runs the encoder's blocks forward once more.
    """
    n_frames = max(0, int(config.n_frames(n_samples)))
    encoder = encoder_flops(config, n_samples)
    heads = cluster_head_flops(config, n_frames, n_clusters, kind=cluster_head)
    heads += predictor_flops(config, n_frames) if predicts else 0.0
    flops = 3.0 * (encoder + heads) + (encoder if teaches else 0.0)
    if recomputes_blocks:
        flops += config.layers * block_flops(config, n_frames)
    if cluster_head != "none":
        flops += n_frames * (sum(log_mel_frame()) + log_density_flops(n_clusters))
    return n_rows * flops


for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.gmm_jepa, _name))(_formula)
