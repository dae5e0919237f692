"""Masked prediction: one objective of which every system is a choice of terms.

    loss = w sum_n a_n mean_c (predictor(masked z)_n - teacher_n)^2           (JepaTerm)
           + lambda sum_n b_n KL(target_n || softmax(cluster_head(h)_n))      (ClusterTerm)

with weights a, b that add up to one over the frames of the global batch, so that the losses of
micro-batches and of processes simply add up (arXiv 2602.09040). h is the encoder's output or the
predictor's; for hard targets the KL is a cross-entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.distributed import Processes
from gmm_jepa.models import EncoderOutput, JepaModel
from gmm_jepa.objectives.batch import Losses, MaskedBatch
from gmm_jepa.objectives.online import OnlineTargets
from gmm_jepa.objectives.schedules import Schedule
from gmm_jepa.objectives.targets import Targets

METER_ROWS = 4096
"""Frames of a micro-batch on which the collapse meters are taken at most, evenly drawn."""


class Heard(NamedTuple):
    """What the networks made of a batch."""

    batch: MaskedBatch
    schedule: Schedule
    encoded: EncoderOutput
    predicted: Tensor | None
    """(R, T, D), the predictor's frames; None where no term needs them."""
    taught: EncoderOutput | None
    """The teacher's, on clean audio; None likewise."""


class TermLoss(NamedTuple):
    """One term of the loss."""

    weighted: Tensor
    """() float32, with its weight."""
    parts: dict[str, Tensor]
    """Detached figures for the log."""
    clusters: Tensor | None = None
    """(A,) int64, if the term asks the cluster head."""


class JepaTerm(nn.Module):
    """Squared error between the predictor's and the teacher's frames, at masked frames."""

    parts = ("jepa",)
    n_clusters = 0

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, model: JepaModel, heard: Heard) -> TermLoss:
        """The term of one micro-batch."""
        batch = heard.batch
        with torch.autocast(batch.clean.device.type, enabled=False):  # the op takes bf16 as it is
            error = ops.masked_mse(
                rows_of(heard.predicted, batch.predicted_rows),
                rows_of(heard.taught.output, batch.predicted_rows),
                batch.predicted_weights,
            )
        return TermLoss(self.weight * error, {"jepa": error.detach()})

    def after_step(self, schedule: Schedule, peers: Processes) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Tensor]:
        """Nothing follows the training."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""


class ClusterTerm(nn.Module):
    """KL or cross-entropy between targets and cluster head, at masked and maybe other frames.

    Args:
        targets: what the head learns.
        head_input: "encoder" or "predictor": whose frames the head reads.
    """

    def __init__(self, targets: Targets | OnlineTargets, head_input: str) -> None:
        super().__init__()
        self.targets = targets
        self.reads_predictor = head_input == "predictor"
        self.parts = (targets.loss_name, "target_entropy", "agreement")
        self.n_clusters = targets.n_clusters

    def forward(self, model: JepaModel, heard: Heard) -> TermLoss:
        """The term of one micro-batch."""
        batch = heard.batch
        frames = heard.predicted if self.reads_predictor else heard.encoded.output
        logits = model.cluster_head(rows_of(frames, batch.anchored_rows))
        with torch.autocast(logits.device.type, enabled=False):  # the ops take bf16 as it is
            found = self.targets.loss(logits, batch, heard.taught, heard.schedule)
        figures = (found.loss.detach(), found.target_entropy, found.agreement)
        return TermLoss(
            heard.schedule.anchor_weight * found.loss,
            dict(zip(self.parts, figures)),
            clusters=logits.detach().argmax(dim=-1),
        )

    def after_step(self, schedule: Schedule, peers: Processes) -> None:
        """Targets that follow the training move on."""
        self.targets.after_step(schedule, peers)

    def state(self) -> dict[str, Tensor]:
        """Of such targets, on the CPU."""
        return self.targets.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.targets.load_state(state)


class MaskedPrediction(nn.Module):
    """The objective around a model; as a module, so that DDP can wrap it.

    Args:
        model: the networks that are trained.
        terms: of the loss, one or more.
        predicts, teaches: whether a term needs the predictor's frames, and the teacher's.
        mask_place: "latent" (the encoder's output is masked) or "input" (its frames are).
        one_graph: rows are always masked behind their lengths, even where all are full.
    """

    def __init__(
        self,
        model: JepaModel,
        terms: list[JepaTerm | ClusterTerm],
        *,
        predicts: bool,
        teaches: bool,
        mask_place: str,
        one_graph: bool = False,
    ) -> None:
        super().__init__()
        self.predicts, self.teaches, self.one_graph = predicts, teaches, one_graph
        self.model = model
        self.terms = nn.ModuleList(terms)
        self.masks_input = mask_place == "input"
        self.parts = tuple(name for term in terms for name in term.parts)
        self.n_clusters = max(term.n_clusters for term in terms)

    def forward(self, batch: MaskedBatch, schedule: Schedule) -> Losses:
        """Losses of one micro-batch."""
        model, lengths = self.model, self._lengths(batch)
        at_input, at_latent = (batch.keep, None) if self.masks_input else (None, batch.keep)
        taught = model.teach(batch.clean, lengths) if self.teaches else None
        encoded = model.encode(batch.disturbed, lengths, keep=at_input)
        predicted = None
        if self.predicts:
            frames = None if lengths is None else encoded.lengths_frames
            predicted = model.predict(encoded.output, at_latent, frames)
        heard = Heard(batch, schedule, encoded, predicted, taught)
        found = [term(model, heard) for term in self.terms]
        return Losses(
            total=sum(term.weighted for term in found),
            parts={name: value for term in found for name, value in term.parts.items()},
            embeddings=self._embeddings(heard),
            clusters=next((term.clusters for term in found if term.clusters is not None), None),
        )

    def _lengths(self, batch: MaskedBatch) -> Tensor | None:
        """The rows' lengths; None on a CPU where all are full, for layers are faster without masks.

        A twelfth of a step of the small conformer. A GPU would have to be waited for to know, and
        compiled networks would have two graphs of one shape.
        """
        lengths, full = batch.lengths_samples, batch.clean.shape[1]
        if self.one_graph or lengths.device.type != "cpu":
            return lengths
        return None if (lengths == full).all() else lengths

    @torch.no_grad()
    def _embeddings(self, heard: Heard) -> dict[str, Tensor]:
        """A few frames of every layer; the front end's where it is not masked."""
        batch, encoded = heard.batch, heard.encoded
        rows = _some(batch.anchored_rows)
        in_sight = _some(batch.visible_rows) if self.masks_input else rows
        frames = {"front_end": rows_of(encoded.layers[0], in_sight)}
        for i, layer in enumerate(encoded.layers[1:], start=1):
            frames[f"layer{i}"] = rows_of(layer, rows)
        frames["online"] = rows_of(encoded.output, rows)
        if heard.taught is not None:
            frames["teacher"] = rows_of(heard.taught.output, rows)
        return {name: values.detach() for name, values in frames.items()}

    def after_step(self, schedule: Schedule, peers: Processes) -> None:
        """Move what follows the training by averages; nothing here has a gradient.

        Args:
            schedule: of the step just done.
            peers: this process among its peers.
        """
        if self.model.teacher is not None:
            self.model.update_teacher(schedule.teacher_decay)
        for term in self.terms:
            term.after_step(schedule, peers)

    def state(self) -> list[dict[str, Tensor]]:
        """What a checkpoint must hold beside the model, on the CPU: of every term."""
        return [term.state() for term in self.terms]

    def load_state(self, state: list[dict[str, Tensor]]) -> None:
        """The inverse of `state`."""
        for term, held in zip(self.terms, state):
            term.load_state(held)

    def targets(self) -> Targets | None:
        """What the cluster head learns, as it is now; None without a head."""
        learnt = [term.targets for term in self.terms if isinstance(term, ClusterTerm)]
        return learnt[0].fixed(self.model.teacher) if learnt else None


def rows_of(frames: Tensor, rows: Tensor) -> Tensor:
    """The frames (R, T, D) at places (N,) of the flattened (R * T): (N, D)."""
    return frames.flatten(0, 1).index_select(0, rows)


def _some(rows: Tensor) -> Tensor:
    """At most `METER_ROWS` of the rows, evenly drawn."""
    return rows[:: -(-len(rows) // METER_ROWS) or 1]
