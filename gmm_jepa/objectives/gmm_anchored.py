"""GMM-anchored JEPA: masked prediction of a teacher beside masked KL to a mixture's posteriors.

loss = sum_n a_n mean_c (predictor(masked z)_n - teacher_n)^2
       + lambda * sum_n b_n KL(posterior_n || softmax(cluster_head(z)_n))

with weights a, b that add up to one over the frames of the global batch, so that the losses of
micro-batches and of processes simply add up (arXiv 2602.09040).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.models.jepa import JepaModel


class MaskedBatch(NamedTuple):
    """Rows of a global batch, ready for the device. R rows, S samples, T encoder frames."""

    clean: Tensor
    """(R, S) float32: what teacher and mixture hear."""
    disturbed: Tensor
    """(R, S) float32: what the online encoder hears."""
    lengths_samples: Tensor
    """(R,) int64."""
    keep: Tensor
    """(R, T) bool: False where the predictor sees the mask token."""
    predicted_rows: Tensor
    """(M,) int64 places in (R * T) at which the teacher is predicted: the masked frames."""
    predicted_weights: Tensor
    """(M,) float32."""
    anchored_rows: Tensor
    """(A,) int64 places in (R * T) at which the cluster head is compared with the mixture."""
    anchored_weights: Tensor
    """(A,) float32."""


class AnchoredLosses(NamedTuple):
    """Parts of the loss and what the meters need; everything but `total` is detached."""

    total: Tensor
    """() float32, to be differentiated."""
    jepa: Tensor
    """() float32: masked mean squared error."""
    kl: Tensor
    """() float32: KL to the mixture's posteriors, in nats."""
    target_entropy: Tensor
    """() float32: mean entropy of the posteriors, in nats."""
    agreement: Tensor
    """() float32: share of frames whose best cluster is the mixture's best component."""
    online: Tensor
    """(A, D) online embeddings at the anchored frames."""
    teacher: Tensor
    """(A, D) teacher embeddings there."""
    clusters: Tensor
    """(A,) int64: the cluster head's best cluster there."""


class GmmAnchored(nn.Module):
    """The objective around a model; as a module, so that DDP can wrap it.

    Args:
        model: the networks that are trained.
        mixture: the frozen anchor, K components over the front end's mel bands.
        front_end: the log-mel features the mixture was fitted on.
        temperature: of the posteriors.
        target_shift_samples: sample on which log-mel frame 0 is centred.
    """

    def __init__(
        self,
        model: JepaModel,
        mixture: ops.Mixture,
        front_end: LogMelSpec,
        *,
        temperature: float = 1.0,
        target_shift_samples: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.front_end = front_end
        self.temperature = temperature
        self.target_shift_samples = target_shift_samples
        for name, tensor in mixture._asdict().items():
            self.register_buffer(f"mixture_{name}", tensor, persistent=False)

    @property
    def mixture(self) -> ops.Mixture:
        """The anchor, on the module's device."""
        return ops.Mixture(*(getattr(self, f"mixture_{name}") for name in ops.Mixture._fields))

    def forward(self, batch: MaskedBatch, anchor_weight: float) -> AnchoredLosses:
        """Losses of one micro-batch, with lambda = `anchor_weight`."""
        model = self.model
        n_frames = batch.keep.shape[1]
        features = self._anchor_features(batch, n_frames)
        teacher = model.teach(batch.clean, batch.lengths_samples).flatten(0, 1)
        encoded = model.encode(batch.disturbed, batch.lengths_samples)
        online = encoded.output.flatten(0, 1)

        predicted = model.predict(encoded.output, batch.keep, encoded.lengths_frames)
        anchored = online.index_select(0, batch.anchored_rows)
        logits = model.cluster_head(anchored)
        with torch.autocast(logits.device.type, enabled=False):  # the ops take bf16 as it is
            jepa = ops.masked_mse(
                predicted.flatten(0, 1).index_select(0, batch.predicted_rows),
                teacher.index_select(0, batch.predicted_rows),
                batch.predicted_weights,
            )
            kl = ops.masked_kl(
                logits,
                features,
                batch.anchored_weights,
                self.mixture,
                temperature=self.temperature,
            )
        return AnchoredLosses(
            total=jepa + anchor_weight * kl.loss,
            jepa=jepa.detach(),
            kl=kl.loss.detach(),
            target_entropy=kl.target_entropy.detach(),
            agreement=kl.agreement.detach(),
            online=anchored.detach(),
            teacher=teacher.index_select(0, batch.anchored_rows),
            clusters=logits.detach().argmax(dim=-1),
        )

    @torch.no_grad()
    def _anchor_features(self, batch: MaskedBatch, n_frames: int) -> Tensor:
        """(A, n_mels) float32 log-mel frames of the clean audio at the anchored frames."""
        frames = log_mel(
            batch.clean,
            batch.lengths_samples,
            spec=self.front_end,
            shift_samples=self.target_shift_samples,
        )
        return frames[:, :n_frames].flatten(0, 1).index_select(0, batch.anchored_rows)
