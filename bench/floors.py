"""Operations and least bytes of every op, as functions of shape.

Operations are counted as `gmm_jepa.flops` counts them, elementwise work only where said. Least
bytes read every input once and write every output once; tables and parameters of an op stay in
cache. A floor is the longer of operations at the peak of the unit that does them and bytes at the
peak of the memory.
"""

from __future__ import annotations

from typing import NamedTuple

from gmm_jepa.flops import log_density_flops, log_mel_frame

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
    """A product; reads the frames and writes a posterior of every component."""
    flops = log_density_flops(n_components, n_features)
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
