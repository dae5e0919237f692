"""From settings and fitted labels to the objective of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gmm_jepa.config import ObjectiveConfig, Recipe
from gmm_jepa.gmm import GaussianMixture, KMeans
from gmm_jepa.models import JepaModel
from gmm_jepa.objectives.masked_prediction import ClusterTerm, JepaTerm, MaskedPrediction
from gmm_jepa.objectives.online import OnlineTargets
from gmm_jepa.objectives.targets import (
    Centroids,
    Clusters,
    HardMixture,
    LayerFrames,
    LogMelFrames,
    SoftMixture,
    Targets,
)


@dataclass(frozen=True)
class Labels:
    """What was fitted before a training; empty for a run without clusters."""

    fitted: tuple[GaussianMixture | KMeans, ...] = ()
    """The mixture (several for an ensemble), or the centroids."""
    encoder: nn.Module | None = None
    """The encoder whose layer they are fitted on; None: log-mel frames."""
    layer: int = 0

    @property
    def mixture_on_log_mel(self) -> GaussianMixture | None:
        """The only mixture, if it is one of log-mel frames."""
        alone = len(self.fitted) == 1 and self.encoder is None
        mixture = self.fitted[0] if alone else None
        return mixture if isinstance(mixture, GaussianMixture) else None


def initial_model(recipe: Recipe) -> JepaModel:
    """The model a run starts from; the same recipe gives the same weights."""
    objective = recipe.objective
    torch.manual_seed(recipe.seed)
    model = JepaModel(
        recipe.encoder,
        n_clusters=recipe.mixture.n_components if objective.anchored else 0,
        cluster_head=objective.cluster_head if objective.anchored else "none",
        predicts=objective.needs_predictor or objective.needs_teacher,
    )
    # What no term uses gets no gradient, and DDP waits for the gradients of all others.
    model.mask_token.requires_grad_(objective.masks)
    if model.predictor is not None:
        model.predictor.requires_grad_(objective.needs_predictor)
    return model


def build_objective(recipe: Recipe, model: JepaModel, labels: Labels) -> MaskedPrediction:
    """The objective of a recipe around a model, on the model's device.

    Of a model without values (on the meta device), the targets have theirs, on the CPU.
    """
    objective = recipe.objective
    device = next(model.parameters()).device
    terms: list[JepaTerm | ClusterTerm] = []
    if objective.jepa_weight > 0:
        terms.append(JepaTerm(objective.jepa_weight))
    if objective.anchored:
        terms.append(ClusterTerm(_targets(recipe, labels), objective.head_input))
    whole = MaskedPrediction(
        model,
        terms,
        predicts=objective.needs_predictor,
        teaches=objective.needs_teacher,
        mask_place=objective.mask_place,
        one_graph=recipe.train.compile,
    )
    return whole if device.type == "meta" else whole.to(device)


def _targets(recipe: Recipe, labels: Labels) -> Targets | OnlineTargets:
    objective = recipe.objective
    clusters = _clusters(objective, labels)
    if labels.encoder is not None:
        return Targets(LayerFrames(labels.encoder, labels.layer), clusters)
    shift = recipe.target_shift_samples
    targets = Targets(LogMelFrames(recipe.front_end, shift_samples=shift), clusters)
    if objective.labels != "online":
        return targets
    return OnlineTargets(
        targets,
        recipe.encoder.code_dim,
        start=objective.online_start,
        seeding=objective.online_seeding,
        decay=objective.online_decay,
        layer=objective.online_layer,
        temperature=objective.temperature,
        variance_floor=recipe.mixture.variance_floor,
    )


def _clusters(objective: ObjectiveConfig, labels: Labels) -> Clusters:
    first = labels.fitted[0]
    if isinstance(first, KMeans):
        return Centroids(torch.as_tensor(first.cluster_centers_, dtype=torch.float32))
    mixtures = [mixture.mixture() for mixture in labels.fitted]
    if objective.targets == "hard":
        return HardMixture(mixtures[0])
    weights = objective.ensemble or (1.0,)
    return SoftMixture(mixtures, weights=weights, temperature=objective.temperature)
