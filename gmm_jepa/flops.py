"""Operations and least bytes of every op and of a training step, as functions of shape.

Operations count a multiplication and an addition as two, in matrix products and convolutions;
elementwise work, small beside them, is left out except where said. Least bytes read every input
once and write every output once; tables and parameters of an op stay in cache. A floor is the
longer of operations at the peak of the unit that does them and bytes at the peak of the memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gmm_jepa.models.config import ConformerConfig

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
) -> Work:
    """KL of so many weighted rows: logits read, gradient written, posterior made on chip."""
    logits = n_components * logit_bytes * (2 if with_gradient else 1)
    flops = gmm_posterior(1, n_components, n_features).flops
    return Work(flops, n_features * in_bytes + logits).scaled(n_rows)


def masked_mse(
    n_rows: int, n_channels: int = 512, *, in_bytes: int = 2, with_gradient: bool = True
) -> Work:
    """Squared error of so many weighted rows: subtract, square, add, scale; no product."""
    tensors = 3 if with_gradient else 2
    return Work(4.0 * n_channels, tensors * n_channels * in_bytes).scaled(n_rows)


def front_end_flops(config: ConformerConfig, n_samples: int) -> float:
    """Waveform of one row to frames: the strided stages and the projection, forward.

    The input convolution and the first strided one count as the one convolution they are run as.
    """
    flops, n_frames = 0.0, n_samples
    for i, stride in enumerate(config.strides):
        c_in, c_out = config.channels[i], config.channels[i + 1]
        n_frames = (n_frames + 2 * (stride // 2) - 2 * stride) // stride + 1
        taps = (2 * stride + 6) if i == 0 else 2 * stride * c_in
        convolutions = config.residual_blocks * 3 * 2  # 3 dilations, each a pair of kernel 3
        flops += 2.0 * n_frames * (taps * c_out + convolutions * 3 * c_out**2)
    return flops + 2.0 * n_frames * config.channels[-1] * config.code_dim


def block_flops(config: ConformerConfig, n_frames: int) -> float:
    """One conformer block over one row of so many frames, forward."""
    D = config.code_dim
    linear = 2 * (2 * 4 * D * D) + 4 * D * D + 3 * D * D  # two feed-forwards, attention, conv
    attention = 2 * n_frames * D + (2 * D if config.relative_bias else 0)
    return 2.0 * n_frames * (linear + attention + config.conv_kernel * D)


def encoder_flops(config: ConformerConfig, n_samples: int) -> float:
    """One row through the encoder, forward."""
    n_frames = max(0, int(config.n_frames(n_samples)))
    aggregation = 2.0 * config.code_dim**2 * (config.layers + 2)
    blocks = config.layers * block_flops(config, n_frames)
    return front_end_flops(config, n_samples) + blocks + aggregation


def heads_flops(config: ConformerConfig, n_frames: int, n_clusters: int) -> float:
    """Predictor and cluster head over one row of so many frames, forward."""
    D, width = config.code_dim, 2 * config.code_dim
    predictor = 2.0 * n_frames * 2 * D * D + block_flops(config, n_frames)
    cluster_head = 2.0 * n_frames * (D * width + 3 * 2 * width * width + width * n_clusters)
    return predictor + cluster_head


def training_step_flops(
    config: ConformerConfig, n_samples: int, *, n_rows: int = 1, n_clusters: int = 1024
) -> float:
    """One step over so many rows of equal length: forward, backward (twice forward), teacher.

    Log-mel, posteriors and losses are in it too; the optimiser's elementwise work is not.
    """
    n_frames = int(config.n_frames(n_samples))
    encoder = encoder_flops(config, n_samples)
    learned = 3.0 * (encoder + heads_flops(config, n_frames, n_clusters))
    targets = log_mel(n_frames, hop=config.hop_samples).flops
    targets += masked_kl(n_frames, n_clusters).flops
    return n_rows * (learned + encoder + targets)
