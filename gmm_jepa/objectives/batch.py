"""What goes into an objective and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskedBatch(NamedTuple):
    """Rows of a global batch, ready for the device. R rows, S samples, T encoder frames."""

    clean: Tensor
    """(R, S) float32: what teacher and targets hear."""
    disturbed: Tensor
    """(R, S) float32: what the online encoder hears."""
    lengths_samples: Tensor
    """(R,) int64."""
    keep: Tensor
    """(R, T) bool: False where the frame is masked."""
    predicted_rows: Tensor
    """(M,) int64 places in (R * T) at which the teacher is predicted: the masked frames."""
    predicted_weights: Tensor
    """(M,) float32."""
    anchored_rows: Tensor
    """(A,) int64 places in (R * T) at which the cluster head is compared with its targets."""
    anchored_weights: Tensor
    """(A,) float32."""
    visible_rows: Tensor
    """(V,) int64 places in (R * T) of the real frames that are not masked."""


class Losses(NamedTuple):
    """Parts of the loss and what the meters need; everything but `total` is detached."""

    total: Tensor
    """() float32, to be differentiated."""
    parts: dict[str, Tensor]
    """() float32 each: terms before their weights, and figures beside them."""
    embeddings: dict[str, Tensor]
    """(N, D) frames for the collapse meters: ``front_end``, ``layer1``, ..., ``online``, and
    ``teacher`` (the frames of ``online``) where there is one."""
    clusters: Tensor | None
    """(A,) int64: the cluster head's best cluster at the anchored frames; None without a head."""
