"""Operations and least bytes of every op and of a training step, as functions of shape.

Operations count a multiplication and an addition as two, in matrix products and convolutions;
elementwise work, small beside them, is left out except where said. Least bytes read every input
once and write every output once; tables and parameters of an op stay in cache. A floor is the
longer of operations at the peak of the unit that does them and bytes at the peak of the memory.
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

FLOAT32_BYTES = 4


class Work(NamedTuple):
    """What an op must do."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def scaled(self, factor: float) -> Work:
        """So many times over."""
        return Work(factor * self.flops, factor * self.bytes)

    def floor_s(self, *, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds below which no implementation gets, given a device's two peaks."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


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


def log_mel(
    n_frames: int,
    *,
    n_fft: int = 400,
    hop: int = 320,
    n_mels: int = 80,
    in_bytes: int = FLOAT32_BYTES,
    out_bytes: int = FLOAT32_BYTES,
    folds: int = 1,
) -> Work:
    """Log-mel of so many frames; `folds` as in `log_mel_frame`."""
    frame = log_mel_frame(n_fft, folds=folds)
    return Work(frame.transform + frame.mel, hop * in_bytes + n_mels * out_bytes).scaled(n_frames)


def gmm_posterior(
    n_frames: int,
    n_components: int = 1024,
    n_features: int = 80,
    *,
    in_bytes: int = FLOAT32_BYTES,
    out_bytes: int = FLOAT32_BYTES,
) -> Work:
    """``[x, x^2] @ [2 D, K]``; reads the frames and writes a posterior of every component."""
    flops = 2.0 * (2 * n_features) * n_components
    return Work(flops, n_features * in_bytes + n_components * out_bytes).scaled(n_frames)


def gmm_posterior_direct(
    n_frames: int,
    n_components: int = 1024,
    n_features: int = 80,
    *,
    in_bytes: int = FLOAT32_BYTES,
    out_bytes: int = FLOAT32_BYTES,
) -> Work:
    """(x - m)^2 / v, summed: a difference, its square, the scale and the sum; no matrix product."""
    least = gmm_posterior(1, n_components, n_features, in_bytes=in_bytes, out_bytes=out_bytes)
    return Work(4.0 * n_features * n_components, least.bytes).scaled(n_frames)


def em_iteration(
    n_frames: int,
    n_components: int = 1024,
    n_features: int = 80,
    *,
    in_bytes: int = FLOAT32_BYTES,
    candidates: float | None = None,
) -> Work:
    """One EM iteration, responsibilities never in memory.

    Args:
        n_frames: N.
        n_components: K.
        n_features: D.
        in_bytes: of a feature.
        candidates: components a frame that matter: they are recomputed directly (four operations a
            feature) and gathered into the statistics (six). None: a dense M-step, another product.
    """
    screen = gmm_posterior(1, n_components, n_features).flops
    refine = screen if candidates is None else candidates * (4 + 6) * n_features
    return Work(screen + refine, n_features * in_bytes).scaled(n_frames)


def masked_kl(
    n_rows: int,
    n_components: int = 1024,
    n_features: int = 80,
    *,
    logit_bytes: int = 2,
    with_gradient: bool = True,
    in_bytes: int = FLOAT32_BYTES,
    n_mixtures: int = 1,
) -> Work:
    """KL of so many weighted rows: logits read, gradient written, posterior made on chip."""
    logits = n_components * logit_bytes * (2 if with_gradient else 1)
    flops = n_mixtures * gmm_posterior(1, n_components, n_features).flops
    return Work(flops, n_features * in_bytes + logits).scaled(n_rows)


def masked_kl_targets(
    n_rows: int, n_components: int = 1024, *, in_bytes: int = 2, with_gradient: bool = True
) -> Work:
    """KL of so many weighted rows to given targets: logits and targets read, gradient written.

    Six operations a value: p log p, p a, e^a, their sums, and the gradient's product and difference
    (logarithm and exponential as one each, with their sums).
    """
    tensors = 3 if with_gradient else 2
    return Work(6.0 * n_components, tensors * n_components * in_bytes).scaled(n_rows)


def masked_cross_entropy(
    n_rows: int, n_components: int = 1024, *, in_bytes: int = 2, with_gradient: bool = True
) -> Work:
    """Cross-entropy of so many weighted rows: logits read, gradient written.

    Four operations a value: the largest, e^a, its sum, and the gradient's product.
    """
    tensors = 2 if with_gradient else 1
    return Work(4.0 * n_components, tensors * n_components * in_bytes).scaled(n_rows)


def masked_mse(
    n_rows: int, n_channels: int = 512, *, in_bytes: int = 2, with_gradient: bool = True
) -> Work:
    """Squared error of so many weighted rows: subtract, square, add, scale; no product."""
    tensors = 3 if with_gradient else 2
    return Work(4.0 * n_channels, tensors * n_channels * in_bytes).scaled(n_rows)


def ema_update(n_values: int, *, value_bytes: int = FLOAT32_BYTES) -> Work:
    """t + c (s - t): three operations; both read, one written."""
    return Work(3.0, 3.0 * value_bytes).scaled(n_values)


def dropout(n_values: int, *, value_bytes: int = FLOAT32_BYTES) -> Work:
    """Forward and gradient: a product each, read and written; drawing is not counted."""
    return Work(2.0, 4.0 * value_bytes).scaled(n_values)


def residual_unit(n_frames: int, n_channels: int) -> Work:
    """Two convolutions of three taps, forward and gradient: three products each.

    Bytes: x, the result and the hidden values of the forward pass; on the way back these, the
    gradient and that of x, float32.
    """
    products = 3 * 2 * 2.0 * 3 * n_frames * n_channels**2
    return Work(flops=products, bytes=4.0 * n_frames * n_channels * (3 + 4))


def density_attention(n_frames: int, n_channels: int) -> Work:
    """Forward and gradient of four Gaussians, about 6 and 18 operations each a value, and bytes:
    x and the result, then x, the gradient and that of x, float32.
    """
    n_values = float(n_frames * n_channels)
    return Work(flops=4 * (6 + 18) * n_values, bytes=4.0 * 5 * n_values)


def attention(n_rows: int, n_heads: int, n_frames: int, dim: int, *, value_bytes: int = 4) -> Work:
    """Forward and gradient with the scores computed twice: seven products over pairs of frames.

    Bytes: q, k, v and the result; then these, the gradient and three more.
    """
    pairs = float(n_rows * n_heads) * n_frames**2
    values = n_rows * n_heads * n_frames * dim
    return Work(flops=7 * 2.0 * dim * pairs, bytes=float(values) * value_bytes * (4 + 8))


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


def heads_flops(config: EncoderConfig, n_frames: int, n_clusters: int) -> float:
    """Predictor and cluster head over one row of so many frames, forward."""
    head = cluster_head_flops(config, n_frames, n_clusters)
    return predictor_flops(config, n_frames) + head


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
        flops += log_mel(n_frames, hop=config.hop_samples).flops
        flops += masked_kl(n_frames, n_clusters).flops
    return n_rows * flops


for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.gmm_jepa, _name))(_formula)
