"""Posteriors and log-likelihoods of frames under a diagonal Gaussian mixture.

    log p(x, k) = log w_k - 1/2 sum_d [log(2 pi v_kd) + (x_d - m_kd)^2 / v_kd]
    posterior   = softmax_k(log p(x, k) / temperature)
    likelihood  = logsumexp_k log p(x, k)

Two precisions. ``exact`` works in float64 (posteriors within 1e-5 of a float64 oracle,
log-likelihoods within 1e-4); ``fast`` is one float32 matrix product on standardised features
(1e-3 and 5e-3). Far from the mixture's centre, as in pure silence, the terms of that product add up
to 1e5 nats, of which half a unit of float32 is 7e-3: here the best component of a fast
log-likelihood is therefore computed once more, as (x - m)^2 / v. Gradients flow to the frames
alone: the mixture is frozen.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_temperature
from gmm_jepa.ops.ensemble import gmm_posterior_ensemble, gmm_topk_ensemble, parameters_of
from gmm_jepa.ops.mixture import (
    Ensemble,
    Mixture,
    check_ensemble,
    check_frames,
    log_joint_of,
    log_likelihood_of,
    quadratic,
    row_chunks,
)
from gmm_jepa.ops.operator import Operator, without_autocast

_COMPUTE = {"fast": torch.float32, "exact": torch.float64}


def gmm_posterior(
    frames: Tensor,
    mixture: Mixture | Ensemble,
    *,
    temperature: float = 1.0,
    log: bool = False,
    precision: str = "fast",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Posterior probability of every component for every frame.

    Args:
        frames: (..., D), any float type.
        mixture: the frozen mixture of K components, or several, whose posteriors are averaged.
        temperature: the log-densities are divided by it before the softmax; above zero.
        log: give the logarithm instead.
        precision: ``"fast"`` (float32) or ``"exact"`` (float64).
        out_dtype: float64 for float64 frames and float32 otherwise, if not given.

    Returns:
        (..., K), differentiable in `frames`.

    Raises:
        InputError: shapes, devices, temperature or precision make no sense.
        TypeError: `frames` is not a floating-point tensor.
    """
    several = isinstance(mixture, Ensemble)
    (check_ensemble if several else check_frames)(frames, mixture)
    check_temperature(temperature)
    _check_precision(precision)
    if out_dtype is not None and not (
        isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point
    ):
        raise InputError(f"out_dtype: expected a floating-point torch.dtype, got {out_dtype!r}")
    op, parameters = _posterior, mixture
    if several:
        op, parameters = gmm_posterior_ensemble, parameters_of(mixture)
    out = op(
        frames.reshape(-1, frames.shape[-1]),
        *parameters,
        float(temperature),
        log,
        precision,
        out_dtype or _result_dtype(frames),
    )
    return out.reshape(*frames.shape[:-1], out.shape[-1])


def gmm_log_likelihood(
    frames: Tensor, mixture: Mixture | Ensemble, *, precision: str = "exact"
) -> Tensor:
    """Log-density log p(x) of every frame, in nats.

    Args:
        frames: (..., D), any float type.
        mixture: the frozen mixture, or several, whose densities are averaged:
            p(x) = sum_m share_m p_m(x).
        precision: ``"exact"`` (float64) or ``"fast"`` (float32).

    Returns:
        (...), float64 for float64 frames and float32 otherwise; differentiable in `frames`.

    Raises:
        InputError: shapes, devices or precision make no sense.
        TypeError: `frames` is not a floating-point tensor.
    """
    several = isinstance(mixture, Ensemble)
    (check_ensemble if several else check_frames)(frames, mixture)
    _check_precision(precision)
    rows = frames.reshape(-1, frames.shape[-1])
    if several:
        out = _mean_log_likelihood(rows, mixture, precision)
    else:
        out = _log_likelihood(rows, *mixture, precision)
    return out.reshape(frames.shape[:-1])


def _mean_log_likelihood(frames: Tensor, ensemble: Ensemble, precision: str) -> Tensor:
    """log sum_m share_m p_m(x) of frames (n, D)."""
    *_, shares = parameters_of(ensemble)
    each = [
        math.log(share) + _log_likelihood(frames, *mixture, precision)
        for share, mixture in zip(shares, ensemble.mixtures)
        if share > 0.0
    ]
    return torch.stack(each).logsumexp(0) if len(each) > 1 else each[0]


def gmm_topk(
    frames: Tensor, mixture: Mixture | Ensemble, k: int, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The k most probable components of every frame; ``k = 1`` is the argmax.

    Args:
        frames: (..., D), any float type.
        mixture: the frozen mixture of K components, or several, of whose mean posterior the
            largest are taken: component k of each must stand for the same cluster.
        k: 1 to K.
        temperature: as in `gmm_posterior`.

    Returns:
        posteriors (..., k) float32, falling, normalised over all K; indices (..., k) int64.
        Exact precision; no gradient.

    Raises:
        InputError: `k` is outside 1..K, mixtures have unequal K and so nothing in common, or
            shapes, devices or temperature make no sense.
    """
    several = isinstance(mixture, Ensemble)
    (check_ensemble if several else check_frames)(frames, mixture)
    check_temperature(temperature)
    n_components = (mixture.mixtures[0] if several else mixture).means.shape[0]
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= n_components:
        raise InputError(f"k: expected 1 to {n_components} components, got {k}")
    rows = frames.detach().reshape(-1, frames.shape[-1])
    op, parameters = _topk, mixture
    if several:
        op, parameters = gmm_topk_ensemble, parameters_of(mixture)
    posteriors, indices = op(rows, *parameters, int(k), float(temperature))
    shape = (*frames.shape[:-1], k)
    return posteriors.reshape(shape), indices.reshape(shape)


def _check_precision(precision: str) -> None:
    if precision not in _COMPUTE:
        raise InputError(f'precision: expected "fast" or "exact", got {precision!r}')


def _result_dtype(frames: Tensor) -> torch.dtype:
    return torch.float64 if frames.dtype == torch.float64 else torch.float32


def posterior_reference(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    log: bool,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """`gmm_posterior` of frames (n, D), in plain torch."""
    form = quadratic(Mixture(log_weights, means, variances), _COMPUTE[precision])
    softmax = torch.log_softmax if log else torch.softmax
    out = frames.new_empty((frames.shape[0], means.shape[0]), dtype=out_dtype)
    for rows in row_chunks(*out.shape):
        out[rows] = softmax(form.log_joint(frames[rows]).div_(temperature), dim=1)
    return out


_posterior = Operator("gmm_jepa::gmm_posterior", posterior_reference)


@_posterior.register_fake
def _(frames, log_weights, means, variances, temperature, log, precision, out_dtype):
    return frames.new_empty((frames.shape[0], means.shape[0]), dtype=out_dtype)


@torch.library.custom_op("gmm_jepa::gmm_posterior_backward", mutates_args=())
def _posterior_backward(
    grad: Tensor,
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    log: bool,
    precision: str,
) -> Tensor:
    dtype = _COMPUTE[precision]
    form = quadratic(Mixture(log_weights, means, variances), dtype)
    grad_frames = torch.empty_like(frames)
    for rows in row_chunks(*grad.shape):
        g = grad[rows].to(dtype)
        posterior = torch.softmax(form.log_joint(frames[rows]).div_(temperature), dim=1)
        if log:
            g_joint = g - posterior * g.sum(1, keepdim=True)
        else:
            g_joint = posterior * (g - (posterior * g).sum(1, keepdim=True))
        grad_frames[rows] = _pull_back(g_joint.div_(temperature), frames[rows], form)
    return grad_frames


def _pull_back(grad_joint: Tensor, frames: Tensor, form) -> Tensor:
    """Gradient with respect to log p(x, k) (n, K) -> with respect to x (n, D).

    With [z, z^2] @ [a; b] the derivative by z is a + 2 z b.
    """
    D = frames.shape[1]
    g_features = grad_joint @ form.weight.T
    z = (frames - form.centre) * form.inverse_scale
    return (g_features[:, :D] + 2.0 * z * g_features[:, D:]) * form.inverse_scale


@_posterior_backward.register_fake
def _(grad, frames, log_weights, means, variances, temperature, log, precision):
    return torch.empty_like(frames)


def _posterior_setup(ctx, inputs, output):
    frames, log_weights, means, variances, temperature, log, precision, _ = inputs
    ctx.save_for_backward(frames, log_weights, means, variances)
    ctx.options = (temperature, log, precision)


def _posterior_vjp(ctx, grad):
    return _posterior_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 7


_posterior.register_autograd(_posterior_vjp, setup_context=_posterior_setup)


def log_likelihood_reference(
    frames: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor, precision: str
) -> Tensor:
    """`gmm_log_likelihood` of frames (n, D), in plain torch."""
    mixture = Mixture(log_weights, means, variances)
    form = quadratic(mixture, _COMPUTE[precision])
    out = frames.new_empty(frames.shape[:1], dtype=_result_dtype(frames))
    for rows in row_chunks(frames.shape[0], means.shape[0]):
        joint = form.log_joint(frames[rows])
        posterior = torch.softmax(joint, dim=1)
        if precision == "fast":
            share, best = posterior.max(1)
            density = log_joint_of(frames[rows], mixture, best)
            out[rows] = (density - share.log()).to(out.dtype)
        else:
            out[rows] = log_likelihood_of(joint, posterior).to(out.dtype)
    return out


_log_likelihood = Operator("gmm_jepa::gmm_log_likelihood", log_likelihood_reference)


@_log_likelihood.register_fake
def _(frames, log_weights, means, variances, precision):
    return frames.new_empty(frames.shape[:1], dtype=_result_dtype(frames))


@torch.library.custom_op("gmm_jepa::gmm_log_likelihood_backward", mutates_args=())
def _log_likelihood_backward(
    grad: Tensor,
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    precision: str,
) -> Tensor:
    form = quadratic(Mixture(log_weights, means, variances), _COMPUTE[precision])
    grad_frames = torch.empty_like(frames)
    for rows in row_chunks(frames.shape[0], means.shape[0]):
        posterior = torch.softmax(form.log_joint(frames[rows]), dim=1)
        slope = _pull_back(posterior, frames[rows], form)
        grad_frames[rows] = (slope * grad[rows, None]).to(frames.dtype)
    return grad_frames


@_log_likelihood_backward.register_fake
def _(grad, frames, log_weights, means, variances, precision):
    return torch.empty_like(frames)


def _log_likelihood_setup(ctx, inputs, output):
    *tensors, precision = inputs
    ctx.save_for_backward(*tensors)
    ctx.precision = precision


def _log_likelihood_vjp(ctx, grad):
    return _log_likelihood_backward(grad, *ctx.saved_tensors, ctx.precision), *[None] * 4


_log_likelihood.register_autograd(_log_likelihood_vjp, setup_context=_log_likelihood_setup)


def topk_reference(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`gmm_topk` of frames (n, D), in plain torch."""
    form = quadratic(Mixture(log_weights, means, variances), torch.float64)
    posteriors = frames.new_empty((frames.shape[0], k), dtype=torch.float32)
    indices = frames.new_empty((frames.shape[0], k), dtype=torch.int64)
    for rows in row_chunks(frames.shape[0], means.shape[0]):
        joint = form.log_joint(frames[rows]).div_(temperature)
        best, indices[rows] = torch.softmax(joint, dim=1).topk(k, dim=1)
        posteriors[rows] = best.float()
    return posteriors, indices


_topk = Operator("gmm_jepa::gmm_topk", topk_reference)


@_topk.register_fake
def _(frames, log_weights, means, variances, k, temperature):
    shape = (frames.shape[0], k)
    return frames.new_empty(shape, dtype=torch.float32), frames.new_empty(shape, dtype=torch.int64)


without_autocast(_posterior, _posterior_backward, _log_likelihood, _log_likelihood_backward, _topk)
