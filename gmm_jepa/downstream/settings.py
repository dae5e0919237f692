"""What a downstream training does: frozen settings, and SUPERB's and a quick choice of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from gmm_jepa.errors import check

TaskName = Literal["asr", "er", "sf"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
Protocol = Literal["quick", "superb"]

_SWEEP = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Training of a head on frozen features with Adam."""

    steps: int
    """Updates of the weights."""
    evaluate_every: int
    """Updates between evaluations on the dev part; the best of them is tested."""
    batch: int
    """Utterances in a batch."""
    accumulate: int = 1
    """Batches whose gradients make one update."""
    learning_rates: tuple[float, ...] = (1e-4,)
    """Each is tried; the best on the dev part is reported."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 1337
    """Of the weights, the batches, dropout and augmentation."""
    projection: int = 256
    """Width of the linear layer under the head."""
    memory_mib: float = 4096.0
    """Features that fit are computed once and kept in memory."""
    disk_mib: float = 0.0
    """Larger ones that fit are kept in the out folder until the end; else computed as needed."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "batch", "accumulate", "projection"):
            value = getattr(self, name)
            check(value >= 1, f"{name}: expected 1 or more, got {value}")
        check(bool(self.learning_rates), "learning_rates: expected at least one, got none")
        for rate in self.learning_rates:
            check(rate > 0, f"learning_rates: expected above 0, got {rate}")
        check(
            len(set(self.learning_rates)) == len(self.learning_rates),
            "learning_rates: expected different ones",
        )
        check(self.clip_norm > 0, f"clip_norm: expected above 0, got {self.clip_norm}")
        for name in ("memory_mib", "disk_mib"):
            value = getattr(self, name)
            check(value >= 0, f"{name}: expected 0 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """SpecAugment on the weighted features (T, D), in training only."""

    time_warp_frames: int = 5
    """A frame is moved by at most this, and those beside it are stretched; 0: none."""
    time_masks: int = 2
    """Masks over frames."""
    time_mask_frames: int = 40
    """A mask is shorter than this."""
    channel_masks: int = 4
    """Masks over channels."""
    channel_mask_width: int = 50
    """A mask is narrower than this."""
    mask_share: float = 1.0
    """And no mask is longer or wider than this share of the frames or channels."""

    def __post_init__(self) -> None:
        for name in ("time_warp_frames", "time_masks", "channel_masks"):
            value = getattr(self, name)
            check(value >= 0, f"{name}: expected 0 or more, got {value}")
        for name in ("time_mask_frames", "channel_mask_width"):
            value = getattr(self, name)
            check(value >= 1, f"{name}: expected 1 or more, got {value}")
        check(
            0 < self.mask_share <= 1, f"mask_share: expected above 0, to 1, got {self.mask_share}"
        )


@dataclass(frozen=True, kw_only=True)
class CtcSettings(ProbeSettings):
    """Linear layer, bidirectional LSTMs and CTC."""

    rnn_layers: int = 2
    """Bidirectional LSTM layers."""
    rnn_width: int = 1024
    """Of each direction."""
    dropout: float = 0.2
    """After each of them."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """SpecAugment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rnn_layers", "rnn_width"):
            value = getattr(self, name)
            check(value >= 1, f"{name}: expected 1 or more, got {value}")
        check(0 <= self.dropout < 1, f"dropout: expected 0 to below 1, got {self.dropout}")


def settings_for(task: TaskName, protocol: Protocol) -> ProbeSettings:
    """The settings of a task.

    `superb`: as s3prl runs it. Transcripts take batches of 16, which is what its buckets of 32,
    halved where long, come to on LibriSpeech. `quick`: a small head for a few minutes on a CPU;
    its masks are a share of the features, so that narrow ones (log-mel) keep most of theirs.
    """
    if protocol == "superb":
        if task == "er":
            return ProbeSettings(
                steps=30_000, evaluate_every=1_000, batch=4, accumulate=8, learning_rates=_SWEEP
            )
        return CtcSettings(
            steps=200_000,
            evaluate_every=2_000,
            batch=16 if task == "asr" else 32,
            projection=1024,
            learning_rates=_SWEEP,
        )
    if task == "er":
        return ProbeSettings(
            steps=300, evaluate_every=50, batch=32, learning_rates=(1e-2, 1e-3, 1e-4)
        )
    return CtcSettings(
        steps=500,
        evaluate_every=100,
        batch=16,
        learning_rates=(3e-3, 1e-3),
        projection=128,
        rnn_layers=1,
        rnn_width=128,
        augment=AugmentSettings(time_warp_frames=0, mask_share=0.065),
    )
