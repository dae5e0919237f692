"""`gmm-jepa plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gmm_jepa.calibration import Calibration, calibrate
from gmm_jepa.cli.parse import ModelName, PresetName, parse
from gmm_jepa.cli.table import format_table
from gmm_jepa.config import Recipe
from gmm_jepa.errors import InputError
from gmm_jepa.files import write_json
from gmm_jepa.plan import Assumptions, Plan, make_plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Predict hours, memory, disk and cost of a training.

    `plan --calibrate --calibration FILE` times a few steps on this machine; `plan --hours H
    --calibration FILE` plans with what it found. Without a calibration a share of the GPU's peak
    is assumed.
    """

    hours: float | None = None
    """Hours of audio."""
    gpus: int = 1
    """GPUs, or CPU processes, that share the batches."""
    preset: PresetName = "paper"
    """Settings to start from; any of them can be overridden below."""
    model: ModelName | None = None
    """Encoder to train; default: the preset's own."""
    device: str | None = None
    """h100, h200, a100, rtx4090 or cpu; default: the calibrated one, or h200."""
    utilisation: float | None = None
    """Share of the GPU's peak that a step reaches; default: an assumption, which is named."""
    epochs: float | None = None
    """Passes over the audio; default: the preset's steps."""
    segment_s: float | None = None
    """Mean seconds of a segment; default: data.max-segment-s, as for long recordings."""
    price_per_hour: float | None = None
    """Of one GPU, in any currency."""
    calibrate: bool = False
    """Time a few steps of the recipe on this machine."""
    calibration: Path | None = None
    """File of a calibration: written with --calibrate, else read."""
    json: Path | None = None
    """Where the plan is written as JSON."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """All settings."""

    def assumptions(self) -> Assumptions:
        """What the plan rests on beside the recipe."""
        names = [field.name for field in dataclasses.fields(Assumptions)]
        return Assumptions(**{name: getattr(self, name) for name in names})


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(PlanOptions, command, arguments)
    if options.hours is None and not options.calibrate:
        raise InputError("hours: expected --hours of audio, or --calibrate")
    if options.json is not None:
        _refuse_other("json", options.json, "training_s")
    if options.calibrate and options.calibration is not None:
        _refuse_other("calibration", options.calibration, "matrix_flops_per_s")
    if options.hours is None:
        _refuse_idle(options)
    assumptions = None if options.hours is None else options.assumptions()
    calibration = _calibration(options)
    if assumptions is None:
        return 0
    plan = make_plan(options.recipe, assumptions, calibration)
    print(format_table(plan_rows(plan)))
    for line in plan.assumed:
        print(f"assumed: {line}")
    warning = memory_warning(plan, options.recipe.train.accumulate)
    if warning:
        print(f"warning: {warning}")
    if options.json is not None:
        write_json(options.json, plan.to_dict())
    return 0


def _refuse_idle(options: PlanOptions) -> None:
    """Raise `InputError` for what a calibration alone has no use for."""
    for name in ("json", "device", "utilisation", "epochs", "price_per_hour"):
        if getattr(options, name) is not None:
            raise InputError(f"{name}: expected with --hours, which asks for a plan")


def _refuse_other(option: str, path: Path, key: str) -> None:
    """Raise `InputError` where there is something else than an object with this key."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise InputError(f"{option}: {path} holds something else; give another file")


def _calibration(options: PlanOptions) -> Calibration | None:
    """What is measured now, or was before."""
    if not options.calibrate:
        return None if options.calibration is None else Calibration.load(options.calibration)
    for name in ("device", "utilisation"):
        if getattr(options, name) is not None:
            raise InputError(f"{name}: expected without --calibrate, which measures this machine")
    if options.gpus < 1:
        raise InputError(f"gpus: expected 1 or more, got {options.gpus}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = calibrate(options.recipe, device, segment_s=options.segment_s, gpus=options.gpus)
    print(json.dumps(dataclasses.asdict(measured), indent=2))
    if options.calibration is not None:
        measured.save(options.calibration)
    return measured


def plan_rows(plan: Plan) -> list[list[str]]:
    """The table of a plan."""
    memory, disk = plan.memory, plan.disk
    per_gpu_s = plan.batch_s / plan.gpus
    rows = [
        ["", f"{plan.gpus} x {plan.device}"],
        ["rate", plan.basis],
        ["steps", f"{plan.steps:,} of {plan.batch_s:g} s, {per_gpu_s:g} s a GPU"],
        ["epochs", f"{plan.epochs:.3g}"],
        ["time of a step", _duration(plan.step_s)],
        ["training", _duration(plan.training_s)],
        ["speed", f"{plan.realtime:,.0f} x real time"],
        ["memory a GPU, in all", _bytes(memory.total)],
        *(
            [f"  {name}", _bytes(value)]
            for name, value in memory._asdict().items()
            if value or name not in ("labels", "gathered")
        ),
        ["disk: packed corpus", _bytes(disk.packed_corpus)],
        ["disk: checkpoints", f"{_bytes(disk.checkpoints)} ({_bytes(disk.checkpoint)} each)"],
    ]
    if plan.price is not None:
        hours = plan.gpus * plan.training_s / 3600
        rows.append(["cost", f"{plan.price:,.2f} ({hours:,.2f} device hours)"])
    return rows


def memory_warning(plan: Plan, accumulate: int) -> str:
    """What to do where the step does not fit; empty where it does or nothing is known."""
    room, memory = plan.device_memory_bytes, plan.memory
    if room == 0 or memory.total <= room:
        return ""
    held = memory.total - memory.activations
    if held >= room:
        advice = "" if plan.gpus == 1 or memory.gathered else ": try --train.shard"
        return f"the networks alone need {_bytes(held)} of {_bytes(room)}{advice}"
    n = -(-accumulate * memory.activations // (0.9 * (room - held)))
    return (
        f"a step needs {_bytes(memory.total)} of {_bytes(room)}: try --train.accumulate {n:.0f}, "
        "or --train.checkpoint-blocks"
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
