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

from typing import NamedTuple

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.mixture import Mixture, check_frames, kind_of, quadratic, row_chunks
from gmm_jepa.ops.posterior import check_temperature


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
    mixture: Mixture,
    *,
    temperature: float = 1.0,
) -> MaskedLoss:
    """KL from the mixture's posteriors to softmax(logits); the posteriors are never stored.

    Args:
        logits: (N, K) float32 or bf16.
        frames: (N, D), the features the mixture was fitted on.
        row_weights: (N,), 0 leaves a row out.
        mixture: the frozen mixture of K components.
        temperature: of the posteriors, as in `gmm_posterior`; precision as its ``"fast"``.

    Raises:
        InputError: shapes, devices or temperature make no sense.
        TypeError: a tensor is not of a floating-point type.
    """
    check_frames(frames, mixture)
    check_temperature(temperature)
    _check_rows(logits, row_weights, "logits")
    if frames.shape != (logits.shape[0], mixture.means.shape[1]):
        raise InputError(f"frames: expected one per row of logits, got {tuple(frames.shape)}")
    if logits.shape[1] != mixture.means.shape[0]:
        raise InputError(
            f"logits: expected {mixture.means.shape[0]} columns, got {tuple(logits.shape)}"
        )
    outputs = _masked_kl(
        logits,
        frames.detach(),
        row_weights.detach(),
        *mixture,
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
        InputError: shapes or devices make no sense.
        TypeError: a tensor is not of a floating-point type.
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
        InputError: shapes or devices make no sense.
        TypeError: a tensor is of the wrong type.
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


class _Sums:
    """What a masked loss gathers while it walks over its weighted rows."""

    def __init__(self, rows: Tensor, row_weights: Tensor, with_gradient: bool) -> None:
        self.index = row_weights.nonzero().squeeze(1)
        self.weights = row_weights[self.index].float()
        self.totals = rows.new_zeros(3, dtype=torch.float64)
        self.gradient = torch.zeros_like(rows) if with_gradient else rows.new_empty(0)
        self.with_gradient = with_gradient
        self.chunks = row_chunks(self.index.shape[0], rows.shape[1])

    def add(self, chunk: slice, *per_row: Tensor) -> None:
        """Add loss, entropy and agreement (n,) of a chunk of the weighted rows, weighted."""
        for i, values in enumerate(per_row):
            self.totals[i] += (self.weights[chunk].double() * values.double()).sum()

    def add_gradient(self, chunk: slice, gradient: Tensor) -> None:
        """Place the gradient (n, K) float32 of each row's own loss, times the row's weight."""
        gradient = gradient * self.weights[chunk, None]
        self.gradient[self.index[chunk]] = gradient.to(self.gradient.dtype)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, entropy, agreement = (self.totals[i].float() for i in range(3))
        return loss, entropy, agreement, self.gradient


def _add_kl(sums: _Sums, chunk: slice, logits: Tensor, p: Tensor, log_p: Tensor) -> None:
    """Add the KL of a chunk: logits any float (n, K), target p and a finite log p float32."""
    log_q = torch.log_softmax(logits.float(), dim=1)
    sums.add(
        chunk,
        (p * (log_p - log_q)).sum(1),
        -(p * log_p).sum(1),
        log_q.argmax(1) == p.argmax(1),
    )
    if sums.with_gradient:
        # softmax anew, not exp of log_q: exp takes ten times as long where it underflows
        q = torch.softmax(logits.float(), dim=1)
        sums.add_gradient(chunk, q * p.sum(1, keepdim=True) - p)


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
    form = quadratic(Mixture(log_weights, means, variances), torch.float32)
    sums = _Sums(logits, row_weights, with_gradient)
    for chunk in sums.chunks:
        rows = sums.index[chunk]
        joint = form.log_joint(frames[rows]).div_(temperature)
        log_p = torch.log_softmax(joint, dim=1)
        p = torch.softmax(joint, dim=1)
        # a component taken out (log weight -inf) carries p = 0: keep its logarithm finite
        _add_kl(sums, chunk, logits[rows], p, log_p.clamp_min_(torch.finfo(log_p.dtype).min))
    return sums.outputs()


_masked_kl = torch.library.custom_op("gmm_jepa::masked_kl", masked_kl_reference, mutates_args=())


def masked_kl_targets_reference(
    logits: Tensor, targets: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `masked_kl_targets`, and the gradient, in plain torch."""
    sums = _Sums(logits, row_weights, with_gradient)
    for chunk in sums.chunks:
        rows = sums.index[chunk]
        p = targets[rows].float()
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        _add_kl(sums, chunk, logits[rows], p, log_p)
    return sums.outputs()


_masked_kl_targets = torch.library.custom_op(
    "gmm_jepa::masked_kl_targets", masked_kl_targets_reference, mutates_args=()
)


def masked_cross_entropy_reference(
    logits: Tensor, labels: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `masked_cross_entropy`, and the gradient, in plain torch."""
    sums = _Sums(logits, row_weights, with_gradient)
    for chunk in sums.chunks:
        rows = sums.index[chunk]
        chosen = logits[rows].float()
        log_q = torch.log_softmax(chosen, dim=1)
        label = labels[rows, None]
        loss = -log_q.gather(1, label).squeeze(1)
        sums.add(chunk, loss, torch.zeros_like(loss), log_q.argmax(1) == label.squeeze(1))
        if with_gradient:
            gradient = torch.softmax(chosen, dim=1)
            gradient.scatter_add_(1, label, gradient.new_full((), -1.0).expand_as(label))
            sums.add_gradient(chunk, gradient)
    return sums.outputs()


_masked_cross_entropy = torch.library.custom_op(
    "gmm_jepa::masked_cross_entropy", masked_cross_entropy_reference, mutates_args=()
)


def masked_mse_reference(
    prediction: Tensor, target: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The output of `masked_mse`, and the gradient, in plain torch."""
    sums = _Sums(prediction, row_weights, with_gradient)
    for chunk in sums.chunks:
        rows = sums.index[chunk]
        error = prediction[rows].float() - target[rows].float()
        sums.add(chunk, error.square().mean(1))
        if with_gradient:
            sums.add_gradient(chunk, error.mul_(2.0 / max(1, error.shape[1])))
    loss, _, _, gradient = sums.outputs()
    return loss, gradient


_masked_mse = torch.library.custom_op("gmm_jepa::masked_mse", masked_mse_reference, mutates_args=())


def _fake_outputs(rows: Tensor, n_scalars: int, with_gradient: bool) -> tuple[Tensor, ...]:
    scalars = [rows.new_empty((), dtype=torch.float32) for _ in range(n_scalars)]
    return (*scalars, torch.empty_like(rows) if with_gradient else rows.new_empty(0))


@_masked_kl.register_fake
def _(logits, frames, row_weights, log_weights, means, variances, temperature, with_gradient):
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
    ctx.n_inputs = len(inputs)


def _scale_gradient(ctx, grad_loss, *_):
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss).to(gradient.dtype), *[None] * (ctx.n_inputs - 1)


for _op in (_masked_kl, _masked_kl_targets, _masked_cross_entropy, _masked_mse):
    _op.register_autograd(_scale_gradient, setup_context=_keep_gradient)
