"""The recipe of a run: frozen, nested dataclasses and their checks.

A recipe says how to train; which audio to train on stands beside it in `Sources`. Both are written
to ``config.json`` in the run folder, and a run resumes only with an equal recipe.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.errors import InputError, check
from gmm_jepa.features import LogMelSpec
from gmm_jepa.models.build import EncoderConfig
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.transformer import TransformerConfig
from gmm_jepa.objective_config import ObjectiveConfig

ENCODERS = {"conformer": ConformerConfig, "transformer": TransformerConfig}
"""Names of the kinds of encoders in ``config.json``."""


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
        check(bool(self.audio), "audio: expected at least one folder, manifest or file, got none")
        check(
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
    """Hold out whole speakers, or utterances; auto: speakers where every utterance names one, four
    or more are named and the corpus has a million utterances at most."""
    max_bad_fraction: float = 0.01
    """Past this share of unusable inputs the run stops."""

    def __post_init__(self) -> None:
        check(
            0 < 2 * self.min_segment_s <= self.max_segment_s < math.inf,
            f"min_segment_s, max_segment_s: expected 0 < 2 * min <= max, "
            f"got {self.min_segment_s} and {self.max_segment_s}",
        )
        check(0 < self.batch_s < math.inf, f"batch_s: expected seconds above 0, got {self.batch_s}")
        check(self.n_buckets >= 1, f"n_buckets: expected at least 1, got {self.n_buckets}")
        check(self.workers >= 0, f"workers: expected 0 or more, got {self.workers}")
        check(
            0 < self.heldout_fraction < 1,
            f"heldout_fraction: expected between 0 and 1, got {self.heldout_fraction}",
        )
        check(
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
        check(self.n_components >= 1, f"n_components: expected 1 or more, got {self.n_components}")
        check(
            0 < self.variance_floor < math.inf,
            f"variance_floor: expected above 0, got {self.variance_floor}",
        )
        check(0 <= self.tol < math.inf, f"tol: expected 0 or more, got {self.tol}")
        check(self.max_iter >= 1, f"max_iter: expected 1 or more, got {self.max_iter}")
        check(self.max_fit_s > 0, f"max_fit_s: expected seconds above 0, got {self.max_fit_s}")


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
    the same, but of online-gmm, whose clusters start from frames of the last one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast for the forward pass; losses, statistics and weights stay fp32."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over the processes; bf16 halves what goes over the network."""
    compile: bool = False
    """Compile the networks, once for every padded length; without a compiler go on without."""
    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs, one for each network and length: fewer launches, more
    memory. Not yet timed on a GPU."""
    checkpoint_blocks: bool = False
    """Keep only what enters each encoder block and compute its inside again for the gradient. Of
    the activations 0.41 are left for the largest transformer, 0.82 for the published conformer,
    whose front end holds most of them (15 s, fp32)."""
    shard: bool = False
    """Each process keeps a share of parameters, gradients, moments and teacher, and gathers a block
    when it is needed: less memory, more traffic. One process shards nothing."""
    log_every: int = 20
    """Steps between lines of metrics; only then is the device waited for."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    alarm: bool = True
    """Warn where the representation degenerates."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            check(value >= 1, f"{name}: expected 1 or more, got {value}")
        check(self.compile or not self.cuda_graphs, "cuda_graphs: needs compile")
        check(not (self.shard and self.cuda_graphs), "cuda_graphs: not possible with shard")
        # The gradient of the first micro-batch would lie where the next one's graph writes.
        check(self.accumulate == 1 or not self.cuda_graphs, "cuda_graphs: needs accumulate 1")
        check(
            0 < self.learning_rate < math.inf,
            f"learning_rate: expected above 0, got {self.learning_rate}",
        )
        check(
            0 <= self.warmup_share < 1,
            f"warmup_share: expected from 0 to below 1, got {self.warmup_share}",
        )
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas: expected two numbers from 0 to below 1, got {self.betas}",
        )
        check(
            0 <= self.weight_decay < math.inf,
            f"weight_decay: expected 0 or more, got {self.weight_decay}",
        )
        check(0 < self.clip_norm < math.inf, f"clip_norm: expected above 0, got {self.clip_norm}")
        for name in ("teacher_decay", "teacher_decay_start"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name}: expected between 0 and 1, got {value}")


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
            check(value > 0, f"{name}: expected seconds above 0, got {value}")


System = Literal["gmm-anchored", "pure-jepa", "wavlm-style", "hubert-style", "online-gmm"]
"""What is trained; each a set of conditions on the objective, see `Recipe`."""


class Iteration(NamedTuple):
    """One training of a run, on one kind of labels; most runs have one."""

    number: int
    """From 1."""
    first_step: int
    """Steps done before it."""
    stop_step: int
    """Steps done after it."""

    @property
    def n_steps(self) -> int:
        """Its share of the run's steps."""
        return self.stop_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run, but for the audio."""

    system: System = "gmm-anchored"
    """Names the objective; its settings may be turned one by one as long as the name holds."""
    seed: int = 0
    """Seeds weights, batches, masks, noise and the clusters' start; 0 or more."""
    front_end: LogMelSpec = field(default_factory=LogMelSpec)
    """Log-mel features of the mixture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Segments and batches."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """The clusters, whether of a mixture or of k-means."""
    encoder: EncoderConfig = field(default_factory=ConformerConfig)
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

    @property
    def iterations(self) -> list[Iteration]:
        """The trainings of the run; the steps are shared evenly."""
        n, steps = self.objective.iterations, self.train.steps
        ends = [steps * i // n for i in range(n + 1)]
        return [Iteration(i + 1, ends[i], ends[i + 1]) for i in range(n)]

    def iteration_at(self, step: int) -> Iteration:
        """The training to which `step` (counted from 0) belongs; past the end, the last one."""
        return next((it for it in self.iterations if step < it.stop_step), self.iterations[-1])

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**31, f"seed: expected 0 to 2^31 - 1, got {self.seed}")
        hop = self.front_end.hop_samples
        check(
            hop == self.encoder.hop_samples,
            f"front_end.hop_samples, encoder: expected equal frame rates, "
            f"got a hop of {hop} samples and an encoder with a hop of {self.encoder.hop_samples}",
        )
        check(
            self.front_end.sample_rate_hz == SAMPLE_RATE_HZ,
            f"front_end.sample_rate_hz: expected {SAMPLE_RATE_HZ}, to which all audio is "
            f"resampled, got {self.front_end.sample_rate_hz}",
        )
        check(
            self.objective.iterations <= self.train.steps,
            f"objective.iterations: expected at most train.steps = {self.train.steps}",
        )
        for name in ("relabel_layer", "online_layer"):
            layer = getattr(self.objective, name)
            check(
                layer is None or 0 <= layer <= self.encoder.layers,
                f"objective.{name}: expected 0 to {self.encoder.layers}, got {layer}",
            )
        _check_system(self.system, self.objective)


def _check_system(system: str, objective: ObjectiveConfig) -> None:
    """Refuse settings that make the system another one."""
    online, iterates = objective.labels == "online", objective.iterations > 1
    held = {
        "gmm-anchored": (
            objective.anchored and objective.labels == "mixture" and not iterates,
            "an anchor (anchor_start above 0), labels mixture, one iteration",
        ),
        "pure-jepa": (
            not objective.anchored and not iterates,
            "no anchor (anchor_start and anchor_end 0), one iteration",
        ),
        "wavlm-style": (
            objective.anchored and not online and not iterates,
            "an anchor (anchor_start above 0), labels kmeans or mixture, one iteration",
        ),
        "hubert-style": (
            objective.anchored and not online and iterates,
            "an anchor (anchor_start above 0), two iterations or more and a relabel_layer",
        ),
        "online-gmm": (
            objective.anchored and online and not iterates,
            "an anchor (anchor_start above 0), labels online, one iteration",
        ),
    }
    holds, expected = held[system]
    check(holds, f"system {system}: expected of the objective {expected}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; an encoder says of which kind it is."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        values[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    kind = next((name for name, encoder in ENCODERS.items() if type(config) is encoder), None)
    return values if kind is None else {"kind": kind, **values}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def from_dict(kind: Any, values: dict[str, Any], *, where: str = "config") -> Any:
    """Rebuild a config dataclass from `to_dict`'s output.

    A setting that is missing, as in files from before there was such a setting, has its default,
    which stands for how things were.

    Raises:
        InputError: a key is unknown, or missing without a default, or a value is refused by the
            dataclass.
    """
    check(isinstance(values, dict), f"{where}: expected an object, got {type(values).__name__}")
    if kind is EncoderConfig or kind in ENCODERS.values():
        values = dict(values)
        name = values.pop("kind", None)
        check(
            name in ENCODERS,
            f"{where}.kind: expected one of {', '.join(ENCODERS)}, got {name!r}",
        )
        kind = ENCODERS[name]
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = set(values) - set(fields)
    missing = {name for name in set(fields) - set(values) if not _has_default(fields[name])}
    if unknown or missing:
        odd = ", ".join(sorted(unknown | missing))
        raise InputError(f"{where}: unknown or missing keys: {odd}")
    built = {name: _value(hints[name], values[name], f"{where}.{name}") for name in values}
    return kind(**built)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return any(
        default is not dataclasses.MISSING for default in (field.default, field.default_factory)
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    """One field from its JSON value."""
    if hint is EncoderConfig or dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if get_origin(hint) is tuple:
        return _items(get_args(hint), value, where)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        check(value in choices, f"{where}: expected one of {', '.join(choices)}, got {value!r}")
        return value
    if get_origin(hint) in (Union, UnionType):  # a value or none
        kinds = [part for part in get_args(hint) if part is not NoneType]
        return None if value is None else _value(kinds[0], value, where)
    check(_fits(value, hint), f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _items(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple from a JSON list; its items are all of one kind (``X, ...``) or each of its own."""
    check(isinstance(value, list), f"{where}: expected a list, got {value!r}")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    check(len(value) == len(hints), f"{where}: expected {len(hints)} values, got {value!r}")
    items = zip(hints, value, strict=True)
    return tuple(_value(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(items))


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
