"""The native module's kernels of the masked losses on CPUs; see `gmm_jepa.ops.native`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmm_jepa.ops import losses
from gmm_jepa.ops.ensemble import TARGET_VALUES
from gmm_jepa.ops.losses import Outputs, TargetsOf
from gmm_jepa.ops.mixture import row_chunks
from gmm_jepa.ops.native import call, check, instruction_sets


class _Rows:
    """Weighted rows (N, K) with room for their losses and gradient."""

    def __init__(self, rows: Tensor, row_weights: Tensor, with_gradient: bool) -> None:
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.weights = row_weights.float().contiguous()
        check("row_weights", (self.weights,), (rows.shape[:1],))
        self.gradient = rows.new_empty(rows.shape if with_gradient else (0,))
        self.losses = torch.empty(len(rows), 3, dtype=torch.float32)

    def arguments(self, part: slice) -> tuple[int, ...]:
        """Of some of the rows: address of values, n, stride, K, addresses of weights, gradient."""
        rows, weights = self.rows[part], self.weights[part]
        gradient = self.gradient[part].data_ptr() if self.gradient.numel() else 0
        n, K = rows.shape
        return rows.data_ptr(), n, rows.stride(0), K, weights.data_ptr(), gradient

    def outputs(self) -> Outputs:
        """Weighted sums of losses, entropies and agreements, and the gradient."""
        totals = (self.weights.double() @ self.losses.double()).float()
        loss, entropy, agreement = (total.clone() for total in totals)  # none an alias of another
        return loss, entropy, agreement, self.gradient


def _is_covered(rows: Tensor) -> bool:
    return rows.dtype == torch.float32 and rows.numel() > 0


def kl_of_frames(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    targets_of: TargetsOf,
    with_gradient: bool,
) -> Outputs:
    """KL to `targets_of` the weighted frames, which are made a large chunk at a time."""
    if not _is_covered(logits):
        return losses.kl_of_frames(logits, frames, row_weights, targets_of, with_gradient)
    rows = _Rows(logits, row_weights, with_gradient)
    for part in row_chunks(*logits.shape, values=TARGET_VALUES):
        weighted = rows.weights[part] != 0
        index = weighted.nonzero().squeeze(1)
        whole = len(index) == len(weighted)
        some = frames[part] if whole else frames[part].index_select(0, index)
        targets, of_row = targets_of(some).contiguous(), weighted.cumsum(0) - 1
        check("targets", (targets,), ((len(index), logits.shape[1]),))
        losses_at = rows.losses[part].data_ptr()
        call("masked_kl", rows.arguments(part), targets.data_ptr(), of_row.data_ptr(), losses_at)
    return rows.outputs()


def masked_kl(
    logits: Tensor,
    frames: Tensor,
    row_weights: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    with_gradient: bool,
) -> Outputs:
    """`masked_kl` of one mixture."""
    targets_of = losses.posteriors_of(log_weights, means, variances, temperature)
    return kl_of_frames(logits, frames, row_weights, targets_of, with_gradient)


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
) -> Outputs:
    """`masked_kl` of an ensemble."""
    targets_of = losses.mean_posteriors_of(log_weights, means, variances, shares, temperature)
    return kl_of_frames(logits, frames, row_weights, targets_of, with_gradient)


def masked_kl_targets(
    logits: Tensor, targets: Tensor, row_weights: Tensor, with_gradient: bool
) -> Outputs:
    """`masked_kl_targets` in one pass."""
    if not _is_covered(logits):
        return losses.masked_kl_targets_reference(logits, targets, row_weights, with_gradient)
    rows, every = _Rows(logits, row_weights, with_gradient), slice(None)
    targets, of_row = targets.float().contiguous(), torch.arange(len(logits), dtype=torch.int64)
    check("targets", (targets,), (logits.shape,))
    losses_at = rows.losses.data_ptr()
    call("masked_kl", rows.arguments(every), targets.data_ptr(), of_row.data_ptr(), losses_at)
    return rows.outputs()


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, row_weights: Tensor, with_gradient: bool
) -> Outputs:
    """`masked_cross_entropy` in one pass."""
    if not _is_covered(logits):
        return losses.masked_cross_entropy_reference(logits, labels, row_weights, with_gradient)
    rows, labels = _Rows(logits, row_weights, with_gradient), labels.contiguous()
    check("labels", (labels,), (logits.shape[:1],), torch.int64)
    losses_at = rows.losses.data_ptr()
    call("masked_cross_entropy", rows.arguments(slice(None)), labels.data_ptr(), losses_at)
    return rows.outputs()


def masked_mse(
    prediction: Tensor, target: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """`masked_mse` in one pass."""
    if not _is_covered(prediction):
        return losses.masked_mse_reference(prediction, target, row_weights, with_gradient)
    rows, target = _Rows(prediction, row_weights, with_gradient), target.float().contiguous()
    check("target", (target,), (prediction.shape,))
    arguments, losses_at = rows.arguments(slice(None)), rows.losses.data_ptr()
    call("masked_mse", arguments, target.data_ptr(), losses_at)
    loss, _, _, gradient = rows.outputs()
    return loss, gradient


if instruction_sets():
    losses._masked_kl.register_kernel("cpu")(masked_kl)
    losses._masked_kl_ensemble.register_kernel("cpu")(masked_kl_ensemble)
    losses._masked_kl_targets.register_kernel("cpu")(masked_kl_targets)
    losses._masked_cross_entropy.register_kernel("cpu")(masked_cross_entropy)
    losses._masked_mse.register_kernel("cpu")(masked_mse)
