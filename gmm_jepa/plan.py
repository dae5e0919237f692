"""Hours, memory, disk and cost of a training before it is begun.

Time is operations (`gmm_jepa.flops`) over a rate: the one a calibration measured, or an assumed
share of a GPU's peak. Memory is that of `gmm_jepa.memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from gmm_jepa.calibration import Calibration, cost_settings, labelling_flops, step_flops
from gmm_jepa.config import Recipe
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.errors import InputError
from gmm_jepa.memory import Memory, memory_of, sharded

PADDING = 0.04
"""Share of the batches that is padding: buckets are chosen to bring it under this."""
PACKED_BYTES = 2
"""Of a sample in a packed corpus."""


class Device(NamedTuple):
    """A GPU as its data sheet has it."""

    name: str
    bf16_flops_per_s: float
    """Dense, on tensor cores."""
    fp32_flops_per_s: float
    """Outside of tensor cores."""
    memory_bytes: float


# NVIDIA's data sheets: H100 (SXM5, 2023), H200 (2024), A100 (SXM4 80GB, 2021), and the
# "Ada GPU architecture" paper, appendix A, for the RTX 4090 (bf16 with fp32 accumulation).
DEVICES = {
    "h100": Device("H100 SXM", 989e12, 67e12, 80e9),
    "h200": Device("H200 SXM", 989e12, 67e12, 141e9),
    "a100": Device("A100 SXM 80GB", 312e12, 19.5e12, 80e9),
    "rtx4090": Device("RTX 4090", 165e12, 82.6e12, 24e9),
}
ASSUMED_SHARE = {"bf16": 0.115, "fp32": 0.50}
"""Of a GPU's peak that a step is taken to reach where nothing was measured. bf16: what the default
conformer's compiled step reached on an H200 (105.3 ms for 32 x 15 s; not compiled it took about
three times as long). fp32: a guess; on a CPU the steps of two presets reached 0.26 and 0.43 to
0.61 of the measured rate of matrix products."""


class Disk(NamedTuple):
    """Bytes on disk."""

    packed_corpus: float
    """All audio as 16-bit samples at 16 kHz."""
    checkpoint: float
    """One."""
    checkpoints: float
    """All that are kept, and the one that is being written."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan rests on beside the recipe."""

    hours: float
    """Of audio."""
    gpus: int = 1
    """Processes, one a GPU."""
    segment_s: float | None = None
    """Mean seconds of a segment; None: `data.max_segment_s`, as long recordings are cut."""
    epochs: float | None = None
    """Passes over the audio; None: the recipe's steps."""
    device: str | None = None
    """One of `DEVICES`; None: the calibration's, or h200."""
    utilisation: float | None = None
    """Share of the peak that a step reaches, with `device`; None: `ASSUMED_SHARE`."""
    price_per_hour: float | None = None
    """Of one GPU."""

    def __post_init__(self) -> None:
        _check_above_zero(self.hours, "hours")
        for name in ("segment_s", "epochs", "price_per_hour", "utilisation"):
            if getattr(self, name) is not None:
                _check_above_zero(getattr(self, name), name)
        if self.gpus < 1:
            raise InputError(f"gpus: expected 1 or more, got {self.gpus}")
        if self.utilisation is not None and self.utilisation > 1:
            raise InputError(
                f"utilisation: expected a share above 0 and up to 1, got {self.utilisation}"
            )


class Rate(NamedTuple):
    """How fast one GPU works through a step."""

    device: str
    flops_per_s: float
    memory_bytes: float
    """0 where unknown."""
    basis: str
    """Where the rate comes from, in words."""
    log_s: float = 0.0
    """Seconds of a line of metrics."""
    checkpoint_s: float = 0.0
    """Seconds of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training will take."""

    device: str
    gpus: int
    basis: str
    """Where the rate comes from, in words."""
    steps: int
    epochs: float
    """Passes over the audio."""
    batch_s: float
    """Audio seconds in a global batch, padding included."""
    rows: int
    """Of a GPU's share of a batch, the largest."""
    step_flops: float
    """Operations of a step on each GPU, the mean over all."""
    step_s: float
    """Seconds a step, likewise."""
    training_s: float
    """Seconds of the training, lines of metrics and checkpoints included."""
    realtime: float
    """Audio seconds that are heard in a second, all GPUs together."""
    memory: Memory
    device_memory_bytes: float
    """0 where unknown."""
    disk: Disk
    price: float | None
    """In the unit of the price per hour."""
    assumed: tuple[str, ...]
    """What was assumed, in words."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; memory in parts and in all."""
        values = dict(vars(self))
        values["memory"] = {**self.memory._asdict(), "total": self.memory.total}
        values["disk"] = self.disk._asdict()
        return values | {"assumed": list(self.assumed)}


def make_plan(
    recipe: Recipe, assumptions: Assumptions, calibration: Calibration | None = None
) -> Plan:
    """Predict a training.

    Args:
        recipe: all settings.
        assumptions: audio, GPUs and prices.
        calibration: a measurement of this or another recipe; None: a GPU's peak counts.

    Raises:
        InputError: the device is unknown or contradicts the calibration, or a GPU's share of the
            batch is less than a row.
    """
    train, gpus = recipe.train, assumptions.gpus
    segment_s = assumptions.segment_s or recipe.data.max_segment_s
    if segment_s > recipe.data.max_segment_s:
        raise InputError(
            f"segment_s: expected at most data.max_segment_s = {recipe.data.max_segment_s:g}, "
            f"got {segment_s:g}"
        )
    if recipe.data.batch_s < gpus * segment_s:
        raise InputError(
            f"data.batch_s: expected a row of {segment_s:g} s for each of {gpus} GPUs, "
            f"{gpus * segment_s:g} s or more, got {recipe.data.batch_s:g}"
        )
    rate = rate_of(recipe, assumptions, calibration)
    heard_s = (1 - PADDING) * recipe.data.batch_s
    steps = train.steps
    if assumptions.epochs is not None:
        steps = max(1, math.ceil(assumptions.epochs * assumptions.hours * 3600 / heard_s))
    rows = math.ceil(int(recipe.data.batch_s / segment_s + 1e-9) / gpus)
    flops = step_flops(recipe, rows, segment_s) + labelling_flops(recipe, rows, segment_s)
    step_s = flops / rate.flops_per_s
    training_s = steps * step_s + math.ceil(steps / train.log_every) * rate.log_s
    training_s += math.ceil(steps / train.checkpoint_every) * rate.checkpoint_s
    price = assumptions.price_per_hour
    whole = memory_of(recipe, -(-rows // train.accumulate), segment_s)
    return Plan(
        device=rate.device,
        gpus=gpus,
        basis=rate.basis,
        steps=steps,
        epochs=steps * heard_s / (assumptions.hours * 3600),
        batch_s=recipe.data.batch_s,
        rows=rows,
        step_flops=flops,
        step_s=step_s,
        training_s=training_s,
        realtime=steps * heard_s / training_s,
        memory=sharded(whole, recipe, gpus),
        device_memory_bytes=rate.memory_bytes,
        disk=_disk_of(whole, recipe, assumptions.hours),
        price=None if price is None else price * gpus * training_s / 3600,
        assumed=tuple(_assumed(recipe, assumptions, calibration, segment_s)),
    )


def rate_of(
    recipe: Recipe, assumptions: Assumptions, calibration: Calibration | None = None
) -> Rate:
    """How fast one GPU works: as calibrated, or by an assumed share of its peak.

    Raises:
        InputError: the device is unknown, or stands beside a calibration.
    """
    if calibration is not None:
        for name in ("device", "utilisation"):
            if getattr(assumptions, name) is not None:
                raise InputError(f"{name}: expected without a calibration, which measured it")
        return Rate(
            calibration.device,
            calibration.flops_per_step / calibration.step_s,
            calibration.memory_bytes,
            f"measured, {calibration.n_steps} steps of {calibration.rows} x "
            f"{calibration.segment_s:g} s: {calibration.share:.0%} of the measured matrix rate",
            calibration.log_s,
            calibration.checkpoint_s,
        )
    name = assumptions.device or "h200"
    if name == "cpu":
        raise InputError(
            "device: a CPU's rate is not known; measure it with plan --calibrate --calibration "
            "FILE and give that file"
        )
    if name not in DEVICES:
        raise InputError(f"device: expected one of {', '.join(DEVICES)} or cpu, got {name!r}")
    device, precision = DEVICES[name], recipe.train.precision
    peak = device.bf16_flops_per_s if precision == "bf16" else device.fp32_flops_per_s
    share = assumptions.utilisation
    basis = "given" if share is not None else "ASSUMED, not measured"
    share = ASSUMED_SHARE[precision] if share is None else share
    return Rate(
        device.name,
        share * peak,
        device.memory_bytes,
        f"{basis}: {share:.3g} of {peak / 1e12:g} TFLOP/s in {precision}",
    )


def _assumed(
    recipe: Recipe, assumptions: Assumptions, calibration: Calibration | None, segment_s: float
) -> list[str]:
    """What the figures take for granted, in words."""
    lines = [f"segments of {segment_s:g} s, {PADDING:.0%} of the batches padding"]
    if assumptions.gpus > 1:
        lines.append("no time lost to communication between the GPUs")
        if recipe.train.shard:
            lines.append(f"networks, gradients, moments and teacher in {assumptions.gpus} parts")
    lines.append("audio read as fast as it is heard; mixture fit and evaluation not counted")
    if calibration is not None and calibration.settings != cost_settings(recipe):
        lines.append(
            "an operation costs what it costs with the calibration's OTHER settings, which is far "
            "off for toys: calibrate with these"
        )
    if calibration is None:
        lines.append("kernels long enough that launching them costs no time; a calibration tells")
        if recipe.train.precision == "bf16" and assumptions.utilisation is None:
            lines.append("the step compiled (--train.compile)")
    return lines


def _disk_of(memory: Memory, recipe: Recipe, hours: float) -> Disk:
    checkpoint = memory.parameters + memory.teacher + memory.optimizer
    return Disk(
        packed_corpus=hours * 3600 * SAMPLE_RATE_HZ * PACKED_BYTES,
        checkpoint=checkpoint,
        checkpoints=(recipe.train.keep_checkpoints + 1) * checkpoint,
    )


def _check_above_zero(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name}: expected a number above 0, got {value}")
