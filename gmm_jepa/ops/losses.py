"""Losses over the weighted rows of a batch; the gradient is made in the forward pass.

    KL    loss_n = sum_k p_nk (log p_nk - log q_nk),   q = softmax(logits)
    CE    loss_n = -log q_n[label_n]
    MSE   loss_n = mean_c (prediction_nc - target_nc)^2

Each returns ``sum_n row_weights[n] * loss_n``: the caller normalises, for example with
``row_weights = mask / masked frames in the global batch``. Rows of weight 0 are never read: they
cost nothing, and NaN there does no harm. Arithmetic is float32 in log space whatever the dtype
of the inputs; sums over rows are float64. Targets, weights and mixture get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.checks import check_temperature, kind_of
from gmm_jepa.ops.ensemble import TARGET_VALUES, mean_of_chunk, parameters_of
from gmm_jepa.ops.masked_rows import MaskedSums, Rows, first_largest
from gmm_jepa.ops.mixture import (
    Ensemble,
    Mixture,
    check_ensemble,
    check_frames,
    row_chunks,
)
from gmm_jepa.ops.operator import without_autocast

TargetsOf = Callable[[Tensor], Tensor]
"""Frames (n, D) -> targets (n, K) float32."""
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weighted sums of loss, entropy and agreement, and the gradient."""


class MaskedLoss(NamedTuple):
    """Scalars float32; only the loss carries a gradient."""

    loss: Tensor
    """sum of row weight x loss"""
    target_entropy: Tensor
    """sum of row weight x entropy of the target, nats; 0 for hard labels"""
    agreement: Tensor
    """sum of row weight x [most probable class = most probable target]"""


def masked_kl(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    mixture: Mixture | Ensemble,
    *,
    temperature: float = 1.0,
) -> MaskedLoss:
    """KL from the mixture's posteriors to softmax(logits); the posteriors are never stored.

    Args:
        logits: (N, K) float32 or bf16.
        frames: (N, D), the features the mixture was fitted on.
        row_weights: (N,), 0 leaves a row out.
        mixture: the frozen mixture of K components, or several, whose posteriors are averaged.
        temperature: of the posteriors, as in `gmm_posterior`; precision as its ``"fast"``.

    Raises:
        InputError: shapes, devices or temperature make no sense.
        TypeError: a tensor is not of a floating-point type.
    """
    several = isinstance(mixture, Ensemble)
    (check_ensemble if several else check_frames)(frames, mixture)
    check_temperature(temperature)
    _check_rows(logits, row_weights, "logits")
    K, D = (mixture.mixtures[0] if several else mixture).means.shape
    if frames.shape != (logits.shape[0], D):
        raise InputError(f"frames: expected one per row of logits, got {tuple(frames.shape)}")
    if logits.shape[1] != K:
        raise InputError(f"logits: expected {K} columns, got {tuple(logits.shape)}")
    op, parameters = _masked_kl, mixture
    if several:
        op, parameters = _masked_kl_ensemble, parameters_of(mixture)
    outputs = op(
        logits,
        frames.detach(),
        row_weights.detach(),
        *parameters,
        float(temperature),
        _wants_gradient(logits),
    )
    return _masked_loss(outputs)


def masked_kl_targets(logits: Tensor, targets: Tensor, row_weights: Tensor) -> MaskedLoss:
    """KL from given target distributions to softmax(logits).

    Args:
        logits: (N, K) float32 or bf16.
        targets: (N, K), rows sum to 1, zeros allowed; for example an average of posteriors.
        row_weights: (N,), 0 leaves a row out.

    Raises:
        InputError: shapes, devices or the type of `targets` make no sense.
        TypeError: `logits` or `row_weights` are not of a floating-point type.
    """
    _check_rows(logits, row_weights, "logits")
    if targets.shape != logits.shape or not targets.is_floating_point():
        raise InputError(
            f"targets: expected probabilities {tuple(logits.shape)}, "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    return _masked_loss(
        _masked_kl_targets(logits, targets.detach(), row_weights.detach(), _wants_gradient(logits))
    )


def masked_cross_entropy(logits: Tensor, labels: Tensor, row_weights: Tensor) -> MaskedLoss:
    """Cross-entropy of softmax(logits) against hard labels.

    Args:
        logits: (N, K) float32 or bf16.
        labels: (N,) int64, 0 to K - 1 where the row weight is not 0.
        row_weights: (N,), 0 leaves a row out.

    Raises:
        InputError: shapes, devices or the type of `labels` make no sense.
        TypeError: `logits` or `row_weights` are not of a floating-point type.
    """
    _check_rows(logits, row_weights, "logits")
    if labels.dtype != torch.int64 or labels.shape != row_weights.shape:
        raise InputError(
            f"labels: expected int64 {tuple(row_weights.shape)}, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    return _masked_loss(
        _masked_cross_entropy(logits, labels, row_weights.detach(), _wants_gradient(logits))
    )


def masked_mse(prediction: Tensor, target: Tensor, row_weights: Tensor) -> Tensor:
    """Squared error, averaged over channels, summed with weights over rows: scalar float32.

    Args:
        prediction: (N, C) float32 or bf16.
        target: (N, C); no gradient.
        row_weights: (N,), 0 leaves a row out.

    Raises:
        InputError: shapes or devices make no sense.
        TypeError: a tensor is not of a floating-point type.
    """
    _check_rows(prediction, row_weights, "prediction")
    if target.shape != prediction.shape:
        raise InputError(f"target: expected {tuple(prediction.shape)}, got {tuple(target.shape)}")
    loss, _ = _masked_mse(
        prediction, target.detach(), row_weights.detach(), _wants_gradient(prediction)
    )
    return loss


def _check_rows(rows: Tensor, row_weights: Tensor, name: str) -> None:
    for label, tensor in ((name, rows), ("row_weights", row_weights)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{label}: expected a floating-point tensor, got {kind_of(tensor)}")
    if rows.ndim != 2 or row_weights.shape != rows.shape[:1]:
        raise InputError(
            f"{name}, row_weights: expected (N, K) and (N,), "
            f"got {tuple(rows.shape)} and {tuple(row_weights.shape)}"
        )
    if rows.device != row_weights.device:
        raise InputError(f"row_weights: on {row_weights.device}, but {name} on {rows.device}")


def _wants_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _masked_loss(outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> MaskedLoss:
    loss, target_entropy, agreement, _ = outputs
    return MaskedLoss(loss, target_entropy.detach(), agreement.detach())


def _add_kl(sums: MaskedSums, rows: Rows, logits: Tensor, p: Tensor) -> None:
    """Add the KL of a chunk's rows: logits any float (n, K), targets p float32 (n, K).

    sum_k p (log p - log q) = sum_k p log p - sum_k p a + sum_k p log sum_k e^a, with a the logits
    less their largest: neither log q nor any exponential but softmax's is needed (exp and log take
    ten times as long where they underflow, as most do here).
    """
    logits = logits.float()
    best = first_largest(logits)
    a = logits - logits.gather(1, best[:, None])
    q = torch.softmax(logits, dim=1)
    log_sum = -q.gather(1, best[:, None]).squeeze(1).log()
    mass = p.sum(1)
    neg_entropy = p.clamp_min(torch.finfo(p.dtype).tiny).log_().mul_(p).sum(1)
    loss = neg_entropy - a.mul_(p).sum(1) + mass * log_sum
    sums.add(rows, loss, -neg_entropy, best == first_largest(p))
    if sums.with_gradient:
        rows.place(q.mul_(mass[:, None]).sub_(p), sums.gradient)


def kl_of_frames(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    targets_of: TargetsOf,
    with_gradient: bool,
) -> Outputs:
    """KL to `targets_of` the frames (n, D) -> (n, K), which are made a large chunk at a time."""
    sums = MaskedSums(logits, row_weights, with_gradient)
    for part in row_chunks(*logits.shape, values=TARGET_VALUES):
        targets, done = targets_of(Rows(row_weights, part).of(frames)), 0
        for rows in sums.chunks(part):
            n = len(rows.weights)
            _add_kl(sums, rows, rows.of(logits), targets[done : done + n])
            done += n
    return sums.outputs()


def posteriors_of(
    log_weights: Tensor, means: Tensor, variances: Tensor, temperature: float
) -> TargetsOf:
    """Of one mixture."""
    mixture = (log_weights, means, variances)
    options = (temperature, False, "fast", torch.float32)
    return lambda frames: torch.ops.gmm_jepa.gmm_posterior(frames, *mixture, *options)


def mean_posteriors_of(
    log_weights: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    shares: Sequence[float],
    temperature: float,
) -> TargetsOf:
    """Of an ensemble."""
    mixtures = (log_weights, means, variances, shares)
    return lambda frames: mean_of_chunk(frames, *mixtures, temperature, False, "fast").float()


def masked_kl_reference(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `masked_kl`, and the gradient, in plain torch."""
    targets_of = posteriors_of(log_weights, means, variances, temperature)
    return kl_of_frames(logits, frames, row_weights, targets_of, with_gradient)


_masked_kl = torch.library.custom_op("gmm_jepa::masked_kl", masked_kl_reference, mutates_args=())


def masked_kl_ensemble_reference(
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
    """The outputs of `masked_kl` of an ensemble, and the gradient, in plain torch."""
    targets_of = mean_posteriors_of(log_weights, means, variances, shares, temperature)
    return kl_of_frames(logits, frames, row_weights, targets_of, with_gradient)


_masked_kl_ensemble = torch.library.custom_op(
    "gmm_jepa::masked_kl_ensemble", masked_kl_ensemble_reference, mutates_args=()
)


def masked_kl_targets_reference(
    logits: Tensor, targets: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `masked_kl_targets`, and the gradient, in plain torch."""
    sums = MaskedSums(logits, row_weights, with_gradient)
    for rows in sums.chunks():
        _add_kl(sums, rows, rows.of(logits), rows.of(targets).float())
    return sums.outputs()


_masked_kl_targets = torch.library.custom_op(
    "gmm_jepa::masked_kl_targets", masked_kl_targets_reference, mutates_args=()
)


def masked_cross_entropy_reference(
    logits: Tensor, labels: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `masked_cross_entropy`, and the gradient, in plain torch."""
    sums = MaskedSums(logits, row_weights, with_gradient)
    for rows in sums.chunks():
        chosen, label = rows.of(logits).float(), rows.of(labels)[:, None]
        best = first_largest(chosen)[:, None]
        q = torch.softmax(chosen, dim=1)
        log_sum = -q.gather(1, best).log()
        loss = (log_sum + (chosen.gather(1, best) - chosen.gather(1, label))).squeeze(1)
        sums.add(rows, loss, torch.zeros_like(loss), (best == label).squeeze(1))
        if with_gradient:
            q.scatter_add_(1, label, q.new_full((), -1.0).expand_as(label))
            rows.place(q, sums.gradient)
    return sums.outputs()


_masked_cross_entropy = torch.library.custom_op(
    "gmm_jepa::masked_cross_entropy", masked_cross_entropy_reference, mutates_args=()
)


def masked_mse_reference(
    prediction: Tensor, target: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The output of `masked_mse`, and the gradient, in plain torch."""
    sums = MaskedSums(prediction, row_weights, with_gradient)
    scale = 1.0 / max(1, prediction.shape[1])
    for rows in sums.chunks():
        error = rows.of(prediction).float() - rows.of(target).float()
        sums.add(rows, scale * torch.linalg.vecdot(error, error))
        if with_gradient:
            rows.place(error.mul_(2.0 * scale), sums.gradient)
    loss, _, _, gradient = sums.outputs()
    return loss, gradient


_masked_mse = torch.library.custom_op("gmm_jepa::masked_mse", masked_mse_reference, mutates_args=())


def _fake_outputs(rows: Tensor, n_scalars: int, with_gradient: bool) -> tuple[Tensor, ...]:
    scalars = [rows.new_empty((), dtype=torch.float32) for _ in range(n_scalars)]
    return (*scalars, rows.new_empty(rows.shape) if with_gradient else rows.new_empty(0))


@_masked_kl.register_fake
def _(logits, frames, row_weights, log_weights, means, variances, temperature, with_gradient):
    return _fake_outputs(logits, 3, with_gradient)


@_masked_kl_ensemble.register_fake
def _(
    logits, frames, row_weights, log_weights, means, variances, shares, temperature, with_gradient
):
    return _fake_outputs(logits, 3, with_gradient)


@_masked_kl_targets.register_fake
def _(logits, targets, row_weights, with_gradient):
    return _fake_outputs(logits, 3, with_gradient)


@_masked_cross_entropy.register_fake
def _(logits, labels, row_weights, with_gradient):
    return _fake_outputs(logits, 3, with_gradient)


@_masked_mse.register_fake
def _(prediction, target, row_weights, with_gradient):
    return _fake_outputs(prediction, 1, with_gradient)


def _keep_gradient(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)  # zeros as large as the logits, for the gradient's gradient
    ctx.nothing = [_no_gradient(value) for value in inputs[1:]]


def _no_gradient(value: object) -> list[None] | None:
    """What autograd wants for an input without a gradient; for a list of tensors, a list."""
    is_list = isinstance(value, (list, tuple)) and isinstance(value[0], Tensor)
    return [None] * len(value) if is_list else None


def _scale_gradient(ctx, grad_loss, *others):
    if others[-1] is not None:
        raise RuntimeError("masked losses: no autograd formula was registered for their gradients")
    if grad_loss is None:
        return None, *ctx.nothing
    (gradient,) = ctx.saved_tensors
    if not _is_one(grad_loss):
        gradient = (gradient * grad_loss).to(gradient.dtype)
    elif not torch.is_grad_enabled():
        gradient = gradient.detach()  # of what was saved, which knows of this node
    return gradient, *ctx.nothing


def _is_one(scale: Tensor) -> bool:
    """Whether a real number on the CPU is 1: a large gradient then need not be written anew."""
    readable = type(scale) is Tensor and scale.device.type == "cpu"
    return readable and not torch.compiler.is_compiling() and float(scale) == 1.0


_LOSSES = (
    _masked_kl,
    _masked_kl_ensemble,
    _masked_kl_targets,
    _masked_cross_entropy,
    _masked_mse,
)
for _op in _LOSSES:
    _op.register_autograd(_scale_gradient, setup_context=_keep_gradient)
without_autocast(*_LOSSES)
