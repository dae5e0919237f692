"""What a cluster head learns: clusters of log-mel frames or of a frozen encoder's layer.

Targets are made on the fly from clean audio, without gradient. They have two parts: the frames
that are clustered (`LogMelFrames`, `LayerFrames`) and the clusters (`SoftMixture`, `HardMixture`,
`Centroids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.distributed import Processes
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.models import Encoder, EncoderOutput
from gmm_jepa.objectives.batch import MaskedBatch
from gmm_jepa.objectives.schedules import Schedule


class Clusters(Protocol):
    """K clusters of D-dimensional frames."""

    loss_name: str
    n_clusters: int

    @property
    def centres(self) -> Tensor:
        """(K, D) float32, one frame in the middle of each."""

    def loss(self, logits: Tensor, frames: Tensor, row_weights: Tensor) -> ops.MaskedLoss:
        """Loss of logits (N, K) at frames (N, D) with weights (N,)."""

    def log_posterior(self, frames: Tensor) -> Tensor:
        """Frames (N, D) -> log of the targets (N, K) float32; minus infinity where they are 0."""


class SoftMixture(nn.Module):
    """Posteriors of a mixture, or the weighted mean of several mixtures' posteriors.

    Args:
        mixtures: one or more, of K components over D features each.
        weights: one for each mixture; they are divided by their sum.
        temperature: of the posteriors.
    """

    loss_name = "kl"

    def __init__(
        self,
        mixtures: Sequence[ops.Mixture],
        *,
        weights: Sequence[float] = (1.0,),
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.held = nn.ModuleList(_Frozen(**mixture._asdict()) for mixture in mixtures)
        self.shares = tuple(weights)
        self.temperature = temperature
        self.n_clusters = mixtures[0].means.shape[0]

    @property
    def mixture(self) -> ops.Mixture | ops.Ensemble:
        """What the posteriors are of, on the module's device."""
        mixtures = tuple(_mixture(held) for held in self.held)
        return mixtures[0] if len(mixtures) == 1 else ops.Ensemble(mixtures, self.shares)

    @property
    def centres(self) -> Tensor:
        """The first mixture's means."""
        return self.held[0].means

    def loss(self, logits: Tensor, frames: Tensor, row_weights: Tensor) -> ops.MaskedLoss:
        """KL from the posteriors to softmax(logits); see `ops.masked_kl`."""
        return ops.masked_kl(
            logits, frames, row_weights, self.mixture, temperature=self.temperature
        )

    def log_posterior(self, frames: Tensor) -> Tensor:
        """Log of the (mean) posterior."""
        return ops.gmm_posterior(
            frames, self.mixture, temperature=self.temperature, log=True, precision="exact"
        ).float()


class _Hard(nn.Module):
    """One label a frame, learnt by cross-entropy."""

    loss_name = "cross_entropy"
    n_clusters: int

    def labels(self, frames: Tensor) -> Tensor:
        """Frames (N, D) -> (N,) int64."""
        raise NotImplementedError

    def loss(self, logits: Tensor, frames: Tensor, row_weights: Tensor) -> ops.MaskedLoss:
        """Cross-entropy of softmax(logits) against the labels."""
        return ops.masked_cross_entropy(logits, self.labels(frames), row_weights)

    def log_posterior(self, frames: Tensor) -> Tensor:
        """0 at a frame's label, minus infinity elsewhere."""
        return F.one_hot(self.labels(frames), self.n_clusters).float().log()


class HardMixture(_Hard):
    """The most probable component of a mixture."""

    def __init__(self, mixture: ops.Mixture) -> None:
        super().__init__()
        self.held = _Frozen(**mixture._asdict())
        self.n_clusters = mixture.means.shape[0]

    @property
    def centres(self) -> Tensor:
        """The means."""
        return self.held.means

    def labels(self, frames: Tensor) -> Tensor:
        """Frames (N, D) -> (N,) int64."""
        return ops.gmm_topk(frames, _mixture(self.held), 1)[1][:, 0]


class Centroids(_Hard):
    """The nearest centroid, as k-means has it: (K, D) float32."""

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.held = _Frozen(centroids=centroids)
        self.n_clusters = centroids.shape[0]

    @property
    def centres(self) -> Tensor:
        """The centroids."""
        return self.held.centroids

    def labels(self, frames: Tensor) -> Tensor:
        """Frames (N, D) -> (N,) int64."""
        return ops.kmeans_assign(frames, self.held.centroids)[0]


class _Frozen(nn.Module):
    """Tensors that move with the module but are no part of a checkpoint."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def _mixture(held: _Frozen) -> ops.Mixture:
    return ops.Mixture(*(getattr(held, name) for name in ops.Mixture._fields))


class LogMelFrames(nn.Module):
    """Log-mel frames of clean audio.

    Args:
        front_end: the features on which the clusters were fitted.
        shift_samples: sample on which frame 0 is centred.
    """

    def __init__(self, front_end: LogMelSpec, *, shift_samples: int = 0) -> None:
        super().__init__()
        self.front_end = front_end
        self.shift_samples = shift_samples

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths_samples: Tensor, n_frames: int) -> Tensor:
        """(R, S), (R,) -> (R, n_frames, n_mels) float32."""
        frames = log_mel(
            waveform, lengths_samples, spec=self.front_end, shift_samples=self.shift_samples
        )
        return frames[:, :n_frames]


class LayerFrames(nn.Module):
    """Standardised frames of a layer of a frozen encoder.

    Args:
        encoder: stays in eval mode and takes no gradient.
        layer: 0 the front end, i the output of block i.
    """

    def __init__(self, encoder: nn.Module, layer: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.layer = layer

    def train(self, mode: bool = True) -> LayerFrames:
        """As `nn.Module.train`, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths_samples: Tensor, n_frames: int) -> Tensor:
        """(R, S), (R,) -> (R, n_frames, D) float32."""
        return layer_frames(self.encoder(waveform, lengths_samples), self.layer)[:, :n_frames]


def layer_frames(encoded: EncoderOutput, layer: int) -> Tensor:
    """One layer, every frame brought to mean 0 and variance 1 over its D channels, (B, T, D).

    So a variance floor means the same in every layer and at any time of a training.
    """
    frames = encoded.layers[layer].float()
    return F.layer_norm(frames, frames.shape[-1:])


class Targets(nn.Module):
    """Frames and their clusters, fixed for the whole training.

    Args:
        frames: `LogMelFrames` or `LayerFrames`.
        clusters: fitted on such frames.
    """

    def __init__(self, frames: LogMelFrames | LayerFrames, clusters: Clusters) -> None:
        super().__init__()
        self.frames = frames
        self.clusters = clusters
        self.loss_name = clusters.loss_name
        self.n_clusters = clusters.n_clusters
        self.shift_samples = getattr(frames, "shift_samples", 0)

    def loss(
        self,
        logits: Tensor,
        batch: MaskedBatch,
        taught: EncoderOutput | None,
        schedule: Schedule,
    ) -> ops.MaskedLoss:
        """Loss of logits (A, K) at the anchored frames."""
        frames = self.frames(batch.clean, batch.lengths_samples, batch.keep.shape[1])
        rows = frames.flatten(0, 1).index_select(0, batch.anchored_rows)
        return self.clusters.loss(logits, rows, batch.anchored_weights)

    def after_step(self, schedule: Schedule, peers: Processes) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Tensor]:
        """Nothing follows the training."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""

    def fixed(self, teacher: Encoder | None) -> Targets:
        """The targets as they are now."""
        return self
