"""Targets that move: a mixture over the teacher's features, learnt while the encoder learns.

A training has three phases, without a stop between them:

1. Targets are the posteriors of a frozen mixture of log-mel frames.
2. Seeding, the last part of the first phase: a layer of the teacher is chosen (the one of highest
   effective rank, unless it is given), K of its frames become centroids, and mini-batch k-means
   (Sculley 2010: every centroid is the mean of all frames it ever got) moves them.
3. Targets are the posteriors of a mixture of that layer's frames. At every step its sufficient
   statistics are ``S <- decay S + S(batch)`` and its parameters follow by one M-step. No gradient
   reaches it.

The scheme is that of S-JEPA (arXiv 2606.19398).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.gmm.em import maximisation
from gmm_jepa.models import Encoder, EncoderOutput
from gmm_jepa.objectives.batch import MaskedBatch
from gmm_jepa.objectives.meters import embedding_meters
from gmm_jepa.objectives.schedules import Schedule
from gmm_jepa.objectives.targets import LayerFrames, SoftMixture, Targets, layer_frames

_STATE = ("counts", "first", "second", "log_weights", "means", "variances")


class OnlineTargets(nn.Module):
    """Posteriors of a log-mel mixture, then of one that follows the teacher.

    Args:
        first: the targets of the first phase, of K components.
        dim: D, width of the teacher's layers.
        start: share of the steps at which the third phase begins.
        seeding: share of the steps before that in which the second one does.
        decay: of the statistics at every step.
        layer: of the teacher; None chooses one.
        temperature: of the posteriors.
        variance_floor: least variance of standardised frames.
    """

    loss_name = "kl"

    def __init__(
        self,
        first: Targets,
        dim: int,
        *,
        start: float,
        seeding: float,
        decay: float,
        layer: int | None,
        temperature: float,
        variance_floor: float,
    ) -> None:
        super().__init__()
        self.first_targets = first
        self.n_clusters = K = first.n_clusters
        self.start, self.seeding, self.decay = start, seeding, decay
        self.temperature, self.variance_floor = temperature, variance_floor
        self.layer = layer
        self.n_seeded = 0
        for name in _STATE:
            shape = (K,) if name in ("counts", "log_weights") else (K, dim)
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64), persistent=False)
        self.variances.fill_(1.0)  # of standardised frames, until there are statistics
        self._batch: ops.EMStatistics | None = None
        self._heard: tuple[EncoderOutput, Tensor] | None = None

    @property
    def mixture(self) -> ops.Mixture:
        """The online mixture as it is, float32."""
        return ops.Mixture(self.log_weights.float(), self.means.float(), self.variances.float())

    def steps(self, n_steps: int) -> tuple[int, int]:
        """First step of the seeding and of the third phase, of a training of `n_steps`."""
        seed = max(1, round((self.start - self.seeding) * n_steps))
        return seed, max(seed + 2, round(self.start * n_steps))

    def loss(
        self, logits: Tensor, batch: MaskedBatch, taught: EncoderOutput | None, schedule: Schedule
    ) -> ops.MaskedLoss:
        """KL from the posteriors of the phase to softmax(logits), (A, K) at the anchored frames."""
        seed, switch = self.steps(schedule.n_steps)
        online = schedule.step >= switch
        if schedule.step >= seed - 1:
            rows = torch.cat((batch.predicted_rows, batch.visible_rows))
            self._heard = taught, rows
            if self._is_seeded:
                self._add(_rows(taught, self.layer, rows), online)
        if not online:
            return self.first_targets.loss(logits, batch, taught, schedule)
        frames = _rows(taught, self.layer, batch.anchored_rows)
        return ops.masked_kl(
            logits, frames, batch.anchored_weights, self.mixture, temperature=self.temperature
        )

    @torch.no_grad()
    def after_step(self, schedule: Schedule, peers: Processes) -> None:
        """Choose a layer, seed, or move the mixture: whatever is due."""
        seed, switch = self.steps(schedule.n_steps)
        if self._heard is None:
            return
        if self.layer is None:
            self.layer = self._choose_layer(peers)
        if not self._is_seeded:
            self._seed(peers)
            if not self._is_seeded and schedule.step == switch - 1:
                raise InputError(
                    f"objective.online_seeding: {self.n_seeded} frames in {switch - seed} steps, "
                    f"but {self.n_clusters} centroids need as many; raise it or the batch"
                )
        elif self._batch is not None:
            online = schedule.step >= switch
            self._move(peers.add_each(self._batch), online)
            if schedule.step == switch - 1:
                self._maximise()
        self._batch = self._heard = None

    @property
    def _is_seeded(self) -> bool:
        return self.n_seeded == self.n_clusters

    def _choose_layer(self, peers: Processes) -> int:
        """The block of highest effective rank, mean over the processes."""
        taught, rows = self._heard
        ranks = [
            embedding_meters(_rows(taught, layer, rows))["effective_rank"]
            for layer in range(1, len(taught.layers))
        ]
        return 1 + int(peers.add(torch.stack(ranks)).argmax())

    def _seed(self, peers: Processes) -> None:
        """Take frames of this step as centroids, evenly drawn; every process offers a share."""
        taught, rows = self._heard
        frames = _rows(taught, self.layer, rows).double()
        n_missing = self.n_clusters - self.n_seeded
        n_each = -(-n_missing // peers.world_size)
        own = frames[_evenly(len(frames), n_each)]
        # A slot for every frame that any process may offer; the last column says which are filled.
        slots = frames.new_zeros(peers.world_size, n_each, frames.shape[1] + 1)
        slots[peers.rank, : len(own)] = F.pad(own, (0, 1), value=1.0)
        slots = peers.add(slots).flatten(0, 1)
        offered = slots[slots[:, -1] > 0, :-1][:n_missing]
        self.means[self.n_seeded : self.n_seeded + len(offered)] = offered
        self.n_seeded += len(offered)

    def _add(self, frames: Tensor, online: bool) -> None:
        """Add the statistics of a micro-batch."""
        if online:
            found = ops.em_statistics(frames, self.mixture)
        else:
            found = ops.kmeans_statistics(frames, self.means)
        if self._batch is not None:
            found = ops.EMStatistics(*(a + b for a, b in zip(self._batch, found)))
        self._batch = found

    def _move(self, batch: ops.EMStatistics, online: bool) -> None:
        """S <- decay S + S(batch), then the parameters; a batch that is not finite is left out."""
        decay = self.decay if online else 1.0
        finite = torch.isfinite(batch.second).all() & torch.isfinite(batch.first).all()
        for name in ("counts", "first", "second"):
            old, new = getattr(self, name), getattr(batch, name)
            old.copy_(torch.where(finite, decay * old + new, old))
        if online:
            self._maximise()
        else:
            n = self.counts[:, None]
            self.means.copy_(torch.where(n > 0, self.first / n.clamp_min(1.0), self.means))

    def _maximise(self) -> None:
        statistics = ops.EMStatistics(self.counts, self.first, self.second, self.counts.sum())
        previous = ops.Mixture(self.log_weights, self.means, self.variances)
        found = maximisation(statistics, previous, self.variance_floor)
        for name, value in zip(ops.Mixture._fields, found):
            getattr(self, name).copy_(value)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, on the CPU."""
        held = {name: getattr(self, name).cpu() for name in _STATE}
        layer = -1 if self.layer is None else self.layer
        return held | {"layer": torch.tensor(layer), "n_seeded": torch.tensor(self.n_seeded)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        layer = int(state["layer"])
        self.layer = None if layer < 0 else layer
        self.n_seeded = int(state["n_seeded"])

    def fixed(self, teacher: Encoder | None) -> Targets:
        """The targets as they are now: on the teacher's layer, or on log-mel before that."""
        if not bool(self.log_weights.any()):
            return self.first_targets
        clusters = SoftMixture([self.mixture], temperature=self.temperature)
        return Targets(LayerFrames(teacher, self.layer), clusters)


def _rows(taught: EncoderOutput, layer: int, rows: Tensor) -> Tensor:
    """(N, D) float32 standardised frames of the teacher's layer."""
    return layer_frames(taught, layer).flatten(0, 1).index_select(0, rows)


def _evenly(n: int, most: int) -> Tensor:
    """At most `most` of n places, evenly drawn."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()
