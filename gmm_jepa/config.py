"""The recipe of a run: frozen, nested dataclasses, their checks, and the presets.

A recipe says how to train; which audio to train on stands beside it in `Sources`. Both are written
to ``config.json`` in the run folder, and a run resumes only with an equal recipe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.models.config import ConformerConfig


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The audio of a run."""

    audio: tuple[str, ...]
    """Folders, JSONL manifests, audio files or packed corpora to train on."""
    weights: tuple[float, ...] = ()
    """How often an utterance of each source comes per training epoch; empty: once. The mixture
    and the held-out part take every source alike."""
    heldout_audio: tuple[str, ...] = ()
    """Sources to evaluate on; empty: a part of `audio` is held out."""

    def __post_init__(self) -> None:
        _check(bool(self.audio), "audio: expected at least one folder, manifest or file, got none")
        _check(
            len(self.weights) in (0, len(self.audio)),
            f"weights: expected one for each of {len(self.audio)} sources, got {len(self.weights)}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Segments, batches and what is held out."""

    max_segment_s: float = 15.0
    """Longer utterances are cut into equal segments of at most this many seconds."""
    min_segment_s: float = 0.2
    """Shorter utterances are left out, and counted."""
    batch_s: float = 480.0
    """Audio seconds in a global batch (all processes together)."""
    n_buckets: int = 32
    """Padded lengths at most; as many are used as bring padding under 4 %."""
    workers: int = 2
    """Decoding processes per training process; 0: decode in the training process."""
    heldout_fraction: float = 0.05
    """Share of the audio that is held out where no held-out source is given."""
    heldout_by: Literal["auto", "speaker", "utterance"] = "auto"
    """Hold out whole speakers, or utterances; auto: speakers where four or more are named."""
    max_bad_fraction: float = 0.01
    """Past this share of unusable inputs the run stops."""

    def __post_init__(self) -> None:
        _check(
            0 < 2 * self.min_segment_s <= self.max_segment_s,
            f"min_segment_s, max_segment_s: expected 0 < 2 * min <= max, "
            f"got {self.min_segment_s} and {self.max_segment_s}",
        )
        _check(self.batch_s > 0, f"batch_s: expected seconds above 0, got {self.batch_s}")
        _check(self.n_buckets >= 1, f"n_buckets: expected at least 1, got {self.n_buckets}")
        _check(self.workers >= 0, f"workers: expected 0 or more, got {self.workers}")
        _check(
            0 < self.heldout_fraction < 1,
            f"heldout_fraction: expected between 0 and 1, got {self.heldout_fraction}",
        )
        _check(
            0 <= self.max_bad_fraction <= 1,
            f"max_bad_fraction: expected between 0 and 1, got {self.max_bad_fraction}",
        )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """The Gaussian mixture that anchors the training."""

    n_components: int = 1024
    """K, also the number of classes of the cluster head."""
    variance_floor: float = 0.1
    """Smallest variance of a component, in squared nats of log-mel."""
    max_iter: int = 50
    """EM iterations at most."""
    tol: float = 1e-3
    """EM stops when the mean log-likelihood per frame gains less than this, in nats."""
    max_fit_s: float = 36_000.0
    """Audio seconds the mixture is fitted on at most, drawn evenly from the corpus."""

    def __post_init__(self) -> None:
        _check(self.n_components >= 1, f"n_components: expected 1 or more, got {self.n_components}")
        _check(
            self.variance_floor > 0,
            f"variance_floor: expected above 0, got {self.variance_floor}",
        )
        _check(self.max_iter >= 1, f"max_iter: expected 1 or more, got {self.max_iter}")
        _check(self.max_fit_s > 0, f"max_fit_s: expected seconds above 0, got {self.max_fit_s}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """GMM-anchored JEPA: masks, anchor and the online encoder's noise (arXiv 2602.09040)."""

    anchor_start: float = 1.0
    """lambda, the weight of the KL to the mixture's posteriors, at the first step."""
    anchor_end: float = 0.01
    """lambda at the last step."""
    anchor_schedule: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    """How lambda goes from start to end; constant stays at start."""
    temperature: float = 1.0
    """Temperature of the mixture's posteriors."""
    unmasked_weight: float = 0.0
    """Weight w of the frames in sight: KL = (mean over masked + w mean over others) / (1 + w)
    (published: 0)."""
    align_targets: bool = False
    """Centre the log-mel frames on the encoder's frames (published: they lie 12 ms apart)."""
    mask_share: tuple[float, float] = (0.40, 0.65)
    """Least and greatest share of an utterance's frames that is masked."""
    mask_span_frames: tuple[int, int] = (10, 25)
    """Shortest and longest masked span."""
    mix_probability: float = 0.25
    """Chance that another utterance is mixed into the online encoder's input."""
    noise_probability: float = 0.25
    """Chance that another signal is added to the online encoder's input as noise."""

    def __post_init__(self) -> None:
        _check(
            self.anchor_start > 0 and self.anchor_end > 0,
            f"anchor_start, anchor_end: expected above 0 (without an anchor the representation "
            f"drifts), got {self.anchor_start} and {self.anchor_end}",
        )
        _check(self.temperature > 0, f"temperature: expected above 0, got {self.temperature}")
        _check(
            self.unmasked_weight >= 0,
            f"unmasked_weight: expected 0 or more, got {self.unmasked_weight}",
        )
        low, high = self.mask_share
        _check(
            0 < low <= high < 1, f"mask_share: expected 0 < least <= most < 1, got {low}, {high}"
        )
        short, long = self.mask_span_frames
        _check(
            short >= 1 and 2 * short <= long + 1,
            f"mask_span_frames: expected 1 <= shortest and 2 * shortest <= longest + 1, "
            f"so that spans fill any count, got {short}, {long}",
        )
        _check(
            min(self.mix_probability, self.noise_probability) >= 0
            and self.mix_probability + self.noise_probability <= 1,
            f"mix_probability, noise_probability: expected 0 or more, together at most 1, "
            f"got {self.mix_probability} and {self.noise_probability}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedules and bookkeeping."""

    steps: int = 50_000
    """Optimiser steps."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    warmup_share: float = 0.0
    """Share of the steps in which the learning rate rises linearly."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to a hundredth."""
    betas: tuple[float, float] = (0.8, 0.99)
    """AdamW's decay rates."""
    weight_decay: float = 1e-3
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    teacher_decay: float = 0.996
    """Decay of the teacher's moving average at the last step."""
    teacher_decay_start: float = 0.996
    """Decay at the first step; it goes to `teacher_decay` linearly."""
    accumulate: int = 1
    """Micro-batches a global batch is cut into, to bound memory; without dropout the result is
    the same."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast for the forward pass; losses, statistics and weights stay fp32."""
    log_every: int = 20
    """Steps between lines of metrics; only then is the device waited for."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    tensorboard: bool = True
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            _check(value >= 1, f"{name}: expected 1 or more, got {value}")
        _check(self.learning_rate > 0, f"learning_rate: expected above 0, got {self.learning_rate}")
        _check(
            0 <= self.warmup_share < 1,
            f"warmup_share: expected from 0 to below 1, got {self.warmup_share}",
        )
        _check(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas: expected two numbers from 0 to below 1, got {self.betas}",
        )
        _check(self.weight_decay >= 0, f"weight_decay: expected 0 or more, got {self.weight_decay}")
        _check(self.clip_norm > 0, f"clip_norm: expected above 0, got {self.clip_norm}")
        for name in ("teacher_decay", "teacher_decay_start"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name}: expected between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on held-out audio after the training."""

    max_train_s: float = 600.0
    """Audio seconds the probes are trained on at most."""
    max_test_s: float = 600.0
    """Held-out audio seconds that are evaluated at most."""

    def __post_init__(self) -> None:
        for name in ("max_train_s", "max_test_s"):
            value = getattr(self, name)
            _check(value > 0, f"{name}: expected seconds above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run, but for the audio."""

    seed: int = 0
    """Seeds weights, batches, masks, noise and the mixture's start; 0 or more."""
    front_end: LogMelSpec = field(default_factory=LogMelSpec)
    """Log-mel features of the mixture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Segments and batches."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """The anchor."""
    encoder: ConformerConfig = field(default_factory=ConformerConfig)
    """The encoder that is pretrained."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Losses and masks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimiser and schedules."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out measurements."""

    @property
    def target_shift_samples(self) -> int:
        """Samples the mixture's frames are shifted by, so that they lie on the encoder's."""
        return int(self.encoder.frame_centre_samples) if self.objective.align_targets else 0

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, f"seed: expected 0 to 2^31 - 1, got {self.seed}")
        hop, strides = self.front_end.hop_samples, self.encoder.strides
        _check(
            hop == self.encoder.hop_samples,
            f"front_end.hop_samples, encoder.strides: expected equal frame rates, "
            f"got a hop of {hop} samples and strides {strides} (hop {self.encoder.hop_samples})",
        )
        _check(
            self.front_end.sample_rate_hz == SAMPLE_RATE_HZ,
            f"front_end.sample_rate_hz: expected {SAMPLE_RATE_HZ}, to which all audio is "
            f"resampled, got {self.front_end.sample_rate_hz}",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """Rebuild a config dataclass from `to_dict`'s output; unknown or missing keys are refused.

    Raises:
        InputError: a key is unknown or missing, or a value is refused by the dataclass.
    """
    hints = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    _check(isinstance(values, dict), f"{where}: expected an object, got {type(values).__name__}")
    if names != set(values):
        odd = ", ".join(sorted(names ^ set(values)))
        raise InputError(f"{where}: unknown or missing keys: {odd}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(hint, value, where=f"{where}.{name}")
        elif get_origin(hint) is tuple:
            _check(isinstance(value, list), f"{where}.{name}: expected a list, got {value!r}")
            value = tuple(value)
        elif get_origin(hint) is Literal:
            _check(
                value in get_args(hint),
                f"{where}.{name}: expected one of {', '.join(get_args(hint))}, got {value!r}",
            )
        else:
            _check(_fits(value, hint), f"{where}.{name}: expected {hint.__name__}, got {value!r}")
        built[name] = value
    return kind(**built)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def paper() -> Recipe:
    """The published settings: conformer of 32 M, K = 1,024, 32 x 15 s, 50,000 steps."""
    return Recipe()


def cpu() -> Recipe:
    """A small conformer that learns in four minutes on two CPU cores."""
    return Recipe(
        data=DataConfig(
            max_segment_s=2.0,
            min_segment_s=0.2,
            batch_s=16.0,
            workers=1,
            heldout_fraction=0.2,
        ),
        mixture=MixtureConfig(n_components=256, max_iter=20, tol=1e-3, max_fit_s=3600.0),
        encoder=ConformerConfig(
            channels=(8, 16, 32, 64),
            strides=(8, 8, 5),
            residual_blocks=1,
            code_dim=128,
            layers=2,
            heads=4,
            daam=False,
            dropout=0.0,
            unit_rms=True,
        ),
        objective=ObjectiveConfig(unmasked_weight=1.0),
        train=TrainConfig(
            steps=1200,
            learning_rate=2e-3,
            warmup_share=0.1,
            learning_rate_schedule="cosine",
            log_every=20,
            checkpoint_every=200,
        ),
    )


def cpu_long() -> Recipe:
    """The same small conformer, trained four times as long."""
    short = cpu()
    return dataclasses.replace(short, train=dataclasses.replace(short.train, steps=5000))


def smoke() -> Recipe:
    """A toy that runs from audio to report in seconds, to try the tools and to test them."""
    short = cpu()
    return dataclasses.replace(
        short,
        data=dataclasses.replace(short.data, batch_s=4.0, max_segment_s=1.0, workers=0),
        mixture=dataclasses.replace(short.mixture, n_components=16, max_iter=5, max_fit_s=120.0),
        encoder=dataclasses.replace(
            short.encoder, channels=(4, 4, 8, 8), code_dim=32, layers=1, heads=2
        ),
        train=dataclasses.replace(short.train, steps=20, log_every=5, checkpoint_every=10),
        evaluate=EvaluateConfig(max_train_s=60.0, max_test_s=30.0),
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "cpu": cpu,
    "cpu-long": cpu_long,
    "smoke": smoke,
    "paper": paper,
}
