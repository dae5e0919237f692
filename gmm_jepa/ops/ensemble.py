"""Posteriors averaged over several mixtures, and their largest: the ops behind `Ensemble`.

    p_nk = sum_m share_m posterior_mnk

Both run each mixture through `gmm_jepa::gmm_posterior`, so the dispatcher picks the device's
kernel, a chunk of rows at a time: memory beside the result does not grow with the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gmm_jepa.ops.mixture import Ensemble, row_chunks
from gmm_jepa.ops.operator import without_autocast

# Posteriors of one mixture alive at one time: 16 MB in float32. Masked KL of half of 24,000 rows,
# K = 1,024, on two cores: 112 ms in chunks of 2^18 values, 74 of 2^20, 60 to 67 of 2^21 to 2^23.
TARGET_VALUES = 1 << 22
# Elsewhere 64 MB: a program makes 128 rows, so 16,384 rows of 1,024 occupy 128 of an H200's 132
# multiprocessors and 4,096 rows 32; and every chunk costs a dozen launches (2.6 ms for 24,000 rows
# of masked KL, two mixtures, in chunks of 4,096; plain torch 0.87 ms).
TARGET_VALUES_ELSEWHERE = 1 << 24

Parameters = tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]


def parameters_of(ensemble: Ensemble) -> Parameters:
    """Log-weights, means, variances and shares (summing to 1) as the ops take them."""
    log_weights, means, variances = (list(part) for part in zip(*ensemble.mixtures))
    total = sum(ensemble.shares)
    return log_weights, means, variances, [float(share) / total for share in ensemble.shares]


def chunks_of(frames: Tensor, n_components: int) -> Iterator[slice]:
    """Rows of frames (n, D) whose posteriors are made at one time."""
    on_cpu = frames.device.type == "cpu"
    values = TARGET_VALUES if on_cpu else TARGET_VALUES_ELSEWHERE
    return row_chunks(frames.shape[0], n_components, values=values)


def _posterior(*arguments) -> Tensor:
    """As the op `gmm_jepa::gmm_posterior`, of one mixture."""
    return torch.ops.gmm_jepa.gmm_posterior(*arguments)


def mean_of_chunk(
    frames: Tensor,
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    temperature: float,
    log: bool,
    precision: str,
) -> Tensor:
    """The mean posterior, or its logarithm, of one chunk (n, D): (n, K).

    Two tensors (n, K) are alive at a time, whatever the number of mixtures.
    """
    dtype = torch.float64 if frames.dtype == torch.float64 else torch.float32
    mean: Tensor | None = None
    total = 0.0
    for share, *mixture in zip(shares, log_weights, means, variances):
        if share == 0.0:
            continue
        p = _posterior(frames, *mixture, temperature, log, precision, dtype)
        total += share
        if log:
            p += math.log(share)
            mean = p if mean is None else torch.logaddexp(mean, p, out=mean)
        else:  # the mean so far, moved towards p: one pass, where two products would need two
            mean = p if mean is None else mean.lerp_(p, share / total)
        del p  # or it would live on beside the next one
    return mean


@torch.library.custom_op("gmm_jepa::gmm_posterior_ensemble", mutates_args=())
def gmm_posterior_ensemble(
    frames: Tensor,
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    temperature: float,
    log: bool,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """`gmm_posterior` of an ensemble for frames (n, D)."""
    out = frames.new_empty((frames.shape[0], means[0].shape[0]), dtype=out_dtype)
    mixtures = (log_weights, means, variances, shares)
    for rows in chunks_of(frames, out.shape[1]):
        out[rows] = mean_of_chunk(frames[rows], *mixtures, temperature, log, precision)
    return out


@gmm_posterior_ensemble.register_fake
def _(frames, log_weights, means, variances, shares, temperature, log, precision, out_dtype):
    return frames.new_empty((frames.shape[0], means[0].shape[0]), dtype=out_dtype)


@torch.library.custom_op("gmm_jepa::gmm_posterior_ensemble_backward", mutates_args=())
def _backward(
    grad: Tensor,
    frames: Tensor,
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    temperature: float,
    log: bool,
    precision: str,
) -> Tensor:
    mixtures = (log_weights, means, variances)
    grad_frames = torch.zeros_like(frames)
    for rows in chunks_of(frames, grad.shape[1]):
        x, g = frames[rows], grad[rows]
        mean = mean_of_chunk(x, *mixtures, shares, temperature, True, precision) if log else None
        for share, *mixture in zip(shares, *mixtures):
            if share == 0.0:
                continue
            g_mixture = g * share
            if mean is not None:  # d log(mean) = sum_m share_m p_m / mean d log p_m
                log_p = torch.ops.gmm_jepa.gmm_posterior(
                    x, *mixture, temperature, True, precision, mean.dtype
                )
                ratio = (log_p - mean).exp().nan_to_num(nan=0.0)  # both -inf: taken out
                g_mixture = g_mixture * ratio
            grad_frames[rows] += torch.ops.gmm_jepa.gmm_posterior_backward(
                g_mixture, x, *mixture, temperature, log, precision
            )
    return grad_frames


@_backward.register_fake
def _(grad, frames, log_weights, means, variances, shares, temperature, log, precision):
    return torch.empty_like(frames)


def _setup(ctx, inputs, output):
    frames, log_weights, means, variances, shares, temperature, log, precision, _ = inputs
    ctx.save_for_backward(frames, *log_weights, *means, *variances)
    ctx.options = (shares, temperature, log, precision)


def _vjp(ctx, grad):
    frames, *tensors = ctx.saved_tensors
    M = len(tensors) // 3
    mixtures = tensors[:M], tensors[M : 2 * M], tensors[2 * M :]
    nothing = [None] * M
    return (
        _backward(grad, frames, *mixtures, *ctx.options),
        nothing,
        nothing,
        nothing,
        *[None] * 5,
    )


gmm_posterior_ensemble.register_autograd(_vjp, setup_context=_setup)


@torch.library.custom_op("gmm_jepa::gmm_topk_ensemble", mutates_args=())
def gmm_topk_ensemble(
    frames: Tensor,
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`gmm_topk` of an ensemble for frames (n, D)."""
    posteriors = frames.new_empty((frames.shape[0], k), dtype=torch.float32)
    indices = frames.new_empty((frames.shape[0], k), dtype=torch.int64)
    mixtures = (log_weights, means, variances, shares)
    for rows in chunks_of(frames, means[0].shape[0]):
        best = mean_of_chunk(frames[rows], *mixtures, temperature, False, "exact").topk(k, dim=1)
        posteriors[rows], indices[rows] = best
    return posteriors, indices


@gmm_topk_ensemble.register_fake
def _(frames, log_weights, means, variances, shares, k, temperature):
    shape = (frames.shape[0], k)
    return frames.new_empty(shape, dtype=torch.float32), frames.new_empty(shape, dtype=torch.int64)


without_autocast(gmm_posterior_ensemble, _backward, gmm_topk_ensemble)
