"""The settings of the objective: every term of the loss, targets and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gmm_jepa.errors import check


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms of the loss: jepa_weight x JEPA error + lambda x (KL or cross-entropy).

    The five systems are points in this space; defaults as in arXiv 2602.09040.
    """

    jepa_weight: float = 1.0
    """Weight of the masked error against the teacher's frames; 0: no such term."""
    anchor_start: float = 1.0
    """lambda, the weight of the cluster term, at the first step; start and end 0: no such term."""
    anchor_end: float = 0.01
    """lambda at the last step."""
    anchor_schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    """How lambda goes from start to end; constant stays at start."""
    labels: Literal["mixture", "kmeans", "online"] = "mixture"
    """Clusters the head learns: a mixture's components, k-means centroids, or an online mixture's
    components in the teacher's features."""
    targets: Literal["soft", "hard"] = "soft"
    """soft: KL to the posteriors; hard: cross-entropy to the best cluster."""
    temperature: float = 1.0
    """Temperature of the posteriors."""
    ensemble: tuple[float, ...] = ()
    """Weights of several mixtures whose posteriors are averaged; empty: one mixture."""
    cluster_head: Literal["mlp", "linear"] = "mlp"
    """Deep residual head (published), or one linear layer."""
    head_input: Literal["encoder", "predictor"] = "encoder"
    """What the cluster head reads: the encoder's output, or the predictor's."""
    mask_place: Literal["latent", "input"] = "latent"
    """latent: the encoder hears everything, its output is masked; input: it sees masked frames."""
    unmasked_weight: float = 0.0
    """Weight w of the frames in sight: KL = (mean over masked + w mean over others) / (1 + w)
    (published: 0)."""
    align_targets: bool = False
    """Centre the log-mel frames on the encoder's frames (published: they lie 12 ms apart)."""
    iterations: int = 1
    """Trainings one after another, each on the labels that the last one's encoder gives."""
    relabel_layer: int | None = None
    """Layer that is clustered between iterations: 0 the front end, i the output of block i."""
    online_start: float = 0.25
    """Share of the steps after which the online mixture takes the place of the log-mel one."""
    online_seeding: float = 0.05
    """Share of the steps before that in which it is seeded by mini-batch k-means."""
    online_decay: float = 0.99
    """Decay of the online mixture's statistics at every step."""
    online_layer: int | None = None
    """Teacher's layer that it models; None: the one of highest effective rank when seeding."""
    mask_share: tuple[float, float] = (0.40, 0.65)
    """Least and greatest share of an utterance's frames that is masked."""
    mask_span_frames: tuple[int, int] = (10, 25)
    """Shortest and longest masked span."""
    mix_probability: float = 0.25
    """Chance that another utterance is mixed into the online encoder's input."""
    noise_probability: float = 0.25
    """Chance that another signal is added to the online encoder's input as noise."""

    @property
    def anchored(self) -> bool:
        """Whether there is a cluster head and a term for it."""
        return self.anchor_start > 0

    @property
    def needs_predictor(self) -> bool:
        """Whether a predictor is trained."""
        return self.jepa_weight > 0 or (self.anchored and self.head_input == "predictor")

    @property
    def needs_teacher(self) -> bool:
        """Whether a moving average of the encoder is kept."""
        return self.jepa_weight > 0 or (self.anchored and self.labels == "online")

    @property
    def masks(self) -> bool:
        """Whether the mask token is put anywhere: masking the latents needs a predictor."""
        return self.mask_place == "input" or self.needs_predictor

    def __post_init__(self) -> None:
        self._check_terms()
        self._check_labels()
        self._check_masks()

    def _check_terms(self) -> None:
        check(
            0 <= self.jepa_weight < math.inf,
            f"jepa_weight: expected 0 or more, got {self.jepa_weight}",
        )
        start, end = self.anchor_start, self.anchor_end
        check(
            all(0 < weight < math.inf for weight in (start, end)) or start == end == 0,
            f"anchor_start, anchor_end: expected above 0 (without an anchor the representation "
            f"drifts), or both 0 for a run without clusters, got {start} and {end}",
        )
        check(
            self.jepa_weight > 0 or self.anchored,
            "jepa_weight, anchor_start: both are 0, so that nothing is left to learn",
        )
        check(
            0 < self.temperature < math.inf,
            f"temperature: expected above 0, got {self.temperature}",
        )
        check(
            0 <= self.unmasked_weight < math.inf,
            f"unmasked_weight: expected 0 or more, got {self.unmasked_weight}",
        )

    def _check_labels(self) -> None:
        check(
            self.labels != "kmeans" or self.targets == "hard",
            "targets: expected hard with k-means labels, which have no posteriors, got soft",
        )
        check(
            self.labels != "online" or self.targets == "soft",
            "targets: expected soft with an online mixture, got hard",
        )
        check(
            not self.ensemble or (self.labels == "mixture" and self.targets == "soft"),
            "ensemble: expected with soft targets of mixtures only",
        )
        check(
            all(0 < weight < math.inf for weight in self.ensemble),
            f"ensemble: expected weights above 0, got {self.ensemble}",
        )
        check(self.iterations >= 1, f"iterations: expected 1 or more, got {self.iterations}")
        check(
            (self.iterations > 1) == (self.relabel_layer is not None),
            f"iterations, relabel_layer: expected a layer if and only if there are two iterations "
            f"or more, got {self.iterations} and {self.relabel_layer}",
        )
        check(
            0 < self.online_seeding <= self.online_start < 1,
            f"online_seeding, online_start: expected 0 < seeding <= start < 1, "
            f"got {self.online_seeding} and {self.online_start}",
        )
        check(
            0 < self.online_decay < 1,
            f"online_decay: expected between 0 and 1, got {self.online_decay}",
        )

    def _check_masks(self) -> None:
        low, high = self.mask_share
        check(0 < low <= high < 1, f"mask_share: expected 0 < least <= most < 1, got {low}, {high}")
        short, long = self.mask_span_frames
        check(
            short >= 1 and 2 * short <= long + 1,
            f"mask_span_frames: expected 1 <= shortest and 2 * shortest <= longest + 1, "
            f"so that spans fill any count, got {short}, {long}",
        )
        check(
            min(self.mix_probability, self.noise_probability) >= 0
            and self.mix_probability + self.noise_probability <= 1,
            f"mix_probability, noise_probability: expected 0 or more, together at most 1, "
            f"got {self.mix_probability} and {self.noise_probability}",
        )
