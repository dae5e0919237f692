"""Triton kernels take the place of the mixture's and the losses' plain-torch ones on CUDA.

The functions here have the signatures of the custom ops; the dispatcher calls them for CUDA
tensors. Triton is imported when the first of them runs. Where it is absent, and for what the
kernels do not cover (float64 frames, logits or results; backward passes through frames), the
plain-torch implementation stays. Mixtures may be float64: the exact kernels keep 48 bits of the
means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.ops import losses, posterior
from gmm_jepa.ops.ensemble import chunks_of, mean_of_chunk
from gmm_jepa.ops.fused import KERNEL_TYPES, covers, has_triton
from gmm_jepa.ops.mixture import Mixture, quadratic
from gmm_jepa.ops.packed import PackedMixtures

_TOPK_VALUES = 1 << 24  # posteriors alive at one time where k best are asked for: 64 MB


def available() -> bool:
    """Whether Triton is installed."""
    return has_triton


def gmm_posterior(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    log: bool,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """As the op `gmm_jepa::gmm_posterior`."""
    mixture = Mixture(log_weights, means, variances)
    if not covers(frames) or out_dtype not in KERNEL_TYPES:
        return posterior.posterior_reference(
            frames, *mixture, temperature, log, precision, out_dtype
        )
    from gmm_jepa.kernels import gmm_posterior as kernel

    operand = operand_of(mixture, exact=precision == "exact")
    return kernel.gmm_posterior(
        frames, operand, means.shape[0], temperature=temperature, log=log, out_dtype=out_dtype
    )


def gmm_log_likelihood(
    frames: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor, precision: str
) -> Tensor:
    """As the op `gmm_jepa::gmm_log_likelihood`."""
    mixture = Mixture(log_weights, means, variances)
    if not covers(frames):
        return posterior.log_likelihood_reference(frames, *mixture, precision)
    from gmm_jepa.kernels import gmm_log_likelihood as kernel

    return kernel.gmm_log_likelihood(frames, operand_of(mixture, exact=precision == "exact"))


def gmm_topk(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """As the op `gmm_jepa::gmm_topk`; beyond the argmax, a sort of posteriors chunk by chunk."""
    mixture = Mixture(log_weights, means, variances)
    if not covers(frames):
        return posterior.topk_reference(frames, *mixture, k, temperature)
    if k == 1:
        from gmm_jepa.kernels import gmm_log_likelihood as kernel

        operand = operand_of(mixture, exact=True)
        best, index = kernel.gmm_argmax(frames, operand, temperature=temperature)
        return best[:, None], index[:, None]
    posteriors = frames.new_empty((frames.shape[0], k), dtype=torch.float32)
    indices = frames.new_empty((frames.shape[0], k), dtype=torch.int64)
    step = max(1, _TOPK_VALUES // means.shape[0])
    for rows in (slice(start, start + step) for start in range(0, frames.shape[0], step)):
        all_of = gmm_posterior(frames[rows], *mixture, temperature, False, "exact", torch.float32)
        posteriors[rows], indices[rows] = all_of.topk(k, dim=1)
    return posteriors, indices


def masked_kl(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::masked_kl`."""
    mixture = Mixture(log_weights, means, variances)
    if not covers(logits, frames, row_weights):
        return losses.masked_kl_reference(
            logits, frames, row_weights, *mixture, temperature, with_gradient
        )
    from gmm_jepa.kernels import masked_kl as kernel

    operand = operand_of(mixture, exact=False)
    return kernel.masked_kl(
        logits,
        frames,
        row_weights,
        operand,
        temperature=temperature,
        with_gradient=with_gradient,
    )


def masked_kl_ensemble(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::masked_kl_ensemble`: chunk by chunk, mean posteriors, then the KL.

    Posteriors are made of all rows, also of those of weight 0: their number is not known here.
    Beside the gradient, which each chunk writes its rows of, those of two mixtures for one chunk
    are alive at a time.
    """
    mixtures = (log_weights, means, variances, shares)
    if not covers(logits, frames, row_weights):
        return losses.masked_kl_ensemble_reference(
            logits, frames, row_weights, *mixtures, temperature, with_gradient
        )
    from gmm_jepa.kernels.masked_kl_targets import partial_sums, sums_of

    gradient = logits.new_empty(logits.shape if with_gradient else 0)
    parts = [logits.new_zeros((1, 3), dtype=torch.float32)]  # of no rows
    for rows in chunks_of(frames, logits.shape[1]):
        targets = mean_of_chunk(frames[rows], *mixtures, temperature, False, "fast")
        of_rows = gradient[rows] if with_gradient else None
        parts.append(partial_sums(logits[rows], targets, row_weights[rows], of_rows))
        del targets  # or they would live on beside the next chunk's
    return *sums_of(torch.cat(parts)), gradient


def masked_kl_targets(
    logits: Tensor, targets: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::masked_kl_targets`."""
    if not covers(logits, targets, row_weights):
        return losses.masked_kl_targets_reference(logits, targets, row_weights, with_gradient)
    from gmm_jepa.kernels import masked_kl_targets as kernel

    return kernel.masked_kl_targets(logits, targets, row_weights, with_gradient=with_gradient)


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::masked_cross_entropy`."""
    if not covers(logits, row_weights):
        return losses.masked_cross_entropy_reference(logits, labels, row_weights, with_gradient)
    from gmm_jepa.kernels import masked_cross_entropy as kernel

    return kernel.masked_cross_entropy(logits, labels, row_weights, with_gradient=with_gradient)


def masked_mse(
    prediction: Tensor, target: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As the op `gmm_jepa::masked_mse`."""
    if not covers(prediction, target, row_weights):
        return losses.masked_mse_reference(prediction, target, row_weights, with_gradient)
    from gmm_jepa.kernels import masked_mse as kernel

    return kernel.masked_mse(prediction, target, row_weights, with_gradient=with_gradient)


def _pack(mixture: Mixture, exact: bool):
    from gmm_jepa.kernels import gaussian

    log_weights, means, variances = mixture
    constant = log_weights.double() - 0.5 * (2.0 * math.pi * variances.double()).log().sum(1)
    if exact:
        return gaussian.direct_operand(means, variances, constant)
    return gaussian.split_operand(*quadratic(mixture, torch.float32), constant)


_packed = PackedMixtures(_pack, n_kept=8)


def operand_of(mixture: Mixture, *, exact: bool):
    """The mixture packed for the kernels (`gmm_jepa.kernels.gaussian.Operand`)."""
    return _packed(mixture, exact)


def register() -> None:
    """Make the functions above the CUDA kernels of their ops."""
    posterior._posterior.register_kernel("cuda")(gmm_posterior)
    posterior._log_likelihood.register_kernel("cuda")(gmm_log_likelihood)
    posterior._topk.register_kernel("cuda")(gmm_topk)
    losses._masked_kl.register_kernel("cuda")(masked_kl)
    losses._masked_kl_ensemble.register_kernel("cuda")(masked_kl_ensemble)
    losses._masked_kl_targets.register_kernel("cuda")(masked_kl_targets)
    losses._masked_cross_entropy.register_kernel("cuda")(masked_cross_entropy)
    losses._masked_mse.register_kernel("cuda")(masked_mse)


if has_triton:
    register()
