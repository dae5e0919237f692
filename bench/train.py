"""The training step beside the published recipe in plain eager PyTorch, in one run.

    python -m bench.train --preset cpu --precision fp32 bf16
    python -m bench.train --preset paper --rows 4 --seconds 4

First the proof: from equal weights, with dropout and augmentation off, both sides must give the
same loss at every one of a few steps (of at most four rows) in float32, to 1e-4; where bf16 is
measured, our side in bf16 must give the plain side's losses in float32, to 2e-3 (in bf16 the plain
side itself is off by up to 3e-2 with the small presets). Then, with both on, the sides take turns:
median audio seconds per second, peak memory (on CUDA the allocator's; on a CPU what its steps add
to a process of its own), the share of the device's peak by the operations of `gmm_jepa.flops`, and
the operations that take longest (on CUDA the kernels, too, in the JSON lines). Our side includes
the loader (reading, masks, noise) in the same process; the plain side is handed its audio and
masks. Where the plain side runs out of the GPU's memory, ours is measured alone and the line says
so. JSON lines go to ``train.jsonl``. ``--skip-proof`` is for several measurements in a row, of
which one has the proof: with ``--compile`` the proof compiles another network, that of float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.peaks import peaks_of
from bench.peers.plain_step import PlainMixture, PlainSettings, PlainStep
from bench.records import (
    RESULTS,
    append,
    forget_peak_bytes,
    need_device,
    peak_bytes,
    surroundings,
    take_turns,
)
from gmm_jepa import flops
from gmm_jepa.calibration import SyntheticCorpus, synthetic_labels
from gmm_jepa.config import Recipe
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.loader import Batch, make_loader
from gmm_jepa.distributed import Processes
from gmm_jepa.models import export_published
from gmm_jepa.objectives.prepare import MaskAndDisturb, micro_batches
from gmm_jepa.objectives.schedules import schedule_at
from gmm_jepa.ops import fused
from gmm_jepa.presets import PRESETS
from gmm_jepa.train.precision import bf16_slowdown
from gmm_jepa.train.profile import op_lines
from gmm_jepa.train.state import TrainState
from gmm_jepa.train.timing import matrix_rate, wait_for
from gmm_jepa.train.trainer import batch_plan, training_step

PROOF_STEPS = 3
PROOF_ROWS = 4
"""In float32 the plain step keeps 73 GB for 32 rows of 15 s of the default conformer."""
PROOF_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-3}
PROFILED_STEPS = 2
SHOWN_OPS = 8
SHOWN_KERNELS = 40


def sized(recipe: Recipe, rows: int | None, seconds: float | None, **settings: Any) -> Recipe:
    """The recipe with batches of so many rows of so many seconds, and settings of its training."""
    seconds = seconds or recipe.data.max_segment_s
    batch_s = rows * seconds if rows else recipe.data.batch_s
    data = dataclasses.replace(
        recipe.data, max_segment_s=seconds, batch_s=batch_s, min_segment_s=seconds / 2
    )
    train = dataclasses.replace(recipe.train, **settings)
    # What the plain step has, and no other.
    objective = dataclasses.replace(recipe.objective, cluster_head="mlp", align_targets=False)
    return dataclasses.replace(recipe, data=data, train=train, objective=objective)


def quiet(recipe: Recipe) -> Recipe:
    """Without dropout and augmentation."""
    return dataclasses.replace(
        recipe,
        encoder=dataclasses.replace(recipe.encoder, dropout=0.0),
        objective=dataclasses.replace(recipe.objective, mix_probability=0.0, noise_probability=0.0),
    )


class Ours:
    """The package's step: loader, losses, update, teacher."""

    def __init__(self, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        self.recipe, self.peers = recipe, Processes(rank=0, world_size=1, device=device)
        labels = synthetic_labels(recipe)
        (self.mixture,) = labels.fitted
        self.state = TrainState(recipe, labels, self.peers)
        self.state.model.train()
        self.batches = self._endless(corpus)

    def _endless(self, corpus: Corpus) -> Iterator[Batch]:
        recipe = self.recipe
        prepare = MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=recipe.seed)
        return make_loader(
            corpus,
            batch_plan(corpus, recipe),
            stop_step=1 << 30,
            pin_memory=self.peers.device.type == "cuda",
            prepare=prepare,
        )

    def __call__(self) -> None:
        """One step."""
        training_step(self.state, next(self.batches), self.recipe, self.peers)


class Plain:
    """The peer's step on the batches of the same loader, made beforehand."""

    def __init__(self, recipe: Recipe, ours: Ours, batches: list[Batch], *, augment: bool) -> None:
        train, objective = recipe.train, recipe.objective
        device = ours.peers.device
        self.recipe = recipe
        self.batches = [(b.waveform.to(device), ~b.extras["mask"].to(device)) for b in batches]
        log_weights, means, variances = ours.mixture.mixture(device=device)
        self.step = PlainStep(
            recipe.encoder,
            PlainMixture(means, variances, log_weights.exp()),
            PlainSettings(
                learning_rate=train.learning_rate,
                betas=train.betas,
                weight_decay=train.weight_decay,
                clip_norm=train.clip_norm,
                teacher_decay=train.teacher_decay,
                temperature=objective.temperature,
                unmasked_weight=objective.unmasked_weight,
                augment=augment,
                autocast=train.precision == "bf16",
            ),
            device,
        )
        self.step.load(export_published(ours.state.model))
        self.turn = 0

    def __call__(self) -> float:
        """One step; its loss."""
        clean, keep = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        return self.step(clean, keep, self.recipe.objective.anchor_start)


def prove(
    recipe: Recipe, corpus: Corpus, device: torch.device, precision: str
) -> list[tuple[float, float]]:
    """Losses of the first steps, ours in a precision and the peer's in float32.

    Raises:
        SystemExit: they differ.
    """
    steady = {"warmup_share": 0.0, "learning_rate_schedule": "constant"}
    train = dataclasses.replace(recipe.train, precision=precision, **steady)
    recipe = quiet(dataclasses.replace(recipe, train=train))
    objective = dataclasses.replace(recipe.objective, anchor_schedule="constant")
    recipe = dataclasses.replace(recipe, objective=objective)
    ours = Ours(recipe, corpus, device)
    batches = [next(ours.batches) for _ in range(PROOF_STEPS)]
    wide = dataclasses.replace(recipe, train=dataclasses.replace(train, precision="fp32"))
    plain = Plain(wide, ours, batches, augment=False)
    pairs = []
    for batch in batches:
        (part,) = micro_batches(batch, 1, unmasked_weight=recipe.objective.unmasked_weight)
        with torch.no_grad():
            part = type(part)(*(tensor.to(device) for tensor in part))
            schedule = schedule_at(recipe, ours.state.step)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                own = ours.state.forward(part, schedule).total.item()
        training_step(ours.state, batch, recipe, ours.peers)
        pairs.append((own, plain()))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    if not worst < PROOF_TOLERANCE[precision]:
        raise SystemExit(f"losses in {precision} differ by {worst:.1e}: {pairs}")
    return pairs


def memory_growth(side: str, recipe: Recipe, rows: int, seconds: float) -> float:
    """Bytes that one side's steps add to a fresh CPU process at their peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grown, (side, recipe, rows, seconds))


def _grown(side: str, recipe: Recipe, rows: int, seconds: float) -> float:
    ours = Ours(recipe, SyntheticCorpus(2 * rows, seconds), torch.device("cpu"))
    step = ours if side == "ours" else Plain(recipe, ours, [next(ours.batches)], augment=True)
    del ours
    gc.collect()
    before = forget_peak_bytes()
    for _ in range(3):
        step()
    return float(peak_bytes() - before)


def cuda_peak(step) -> float:
    """Bytes of the allocator's peak during a step."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return float(torch.cuda.max_memory_allocated())


def breakdown(step: Callable[[], object], device: torch.device, precision: str) -> list[dict]:
    """The operations that take longest, each with its milliseconds and share of a step."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True) as run:
        for _ in range(PROFILED_STEPS):
            step()
        wait_for(device)
    events = run.key_averages(group_by_input_shape=True)
    rate = matrix_rate(device, precision)
    lines = op_lines(events, PROFILED_STEPS, rate, on_gpu=on_gpu)[:SHOWN_OPS]
    return [
        {"op": line.name, "ms": round(line.ms, 3), "share": round(line.share, 3)} for line in lines
    ]


def kernels(step: Callable[[], object]) -> list[dict]:
    """The CUDA kernels that take longest: milliseconds and calls of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    on_gpu = [e for e in run.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu.sort(key=lambda event: -event.self_device_time_total)
    return [
        {
            "kernel": event.key[:120],
            "ms": round(event.self_device_time_total / 1e3 / PROFILED_STEPS, 3),
            "calls": event.count / PROFILED_STEPS,
        }
        for event in on_gpu[:SHOWN_KERNELS]
    ]


def measure(recipe: Recipe, rows: int, seconds: float, device: torch.device, repeats: int) -> dict:
    """Both sides in turn; ours alone where the GPU's memory does not hold the plain one."""
    corpus = SyntheticCorpus(4 * rows, seconds)
    ours = Ours(recipe, corpus, device)
    plain = Plain(recipe, ours, [next(ours.batches) for _ in range(4)], augment=True)
    sides: dict[str, Callable[[], object]] = {"ours": ours, "plain": plain}
    # May compile; with the warm-up below two steps lie before the measurement, and a CUDA graph is
    # recorded in the second.
    begin = time.perf_counter()
    ours()
    wait_for(device)
    first_step_s = time.perf_counter() - begin
    try:
        plain()
    except torch.OutOfMemoryError:
        del sides["plain"], plain
        torch.cuda.empty_cache()
    times = take_turns(sides, repeats, device=device.type)
    if device.type == "cuda":
        memory = {name: cuda_peak(step) for name, step in sides.items()}
    else:
        memory = {side: memory_growth(side, recipe, rows, seconds) for side in sides}
    audio_s = rows * seconds
    work = flops.training_step_flops(
        recipe.encoder,
        round(seconds * SAMPLE_RATE_HZ),
        n_rows=rows,
        n_clusters=recipe.mixture.n_components,
    )
    peaks = peaks_of(device.type)
    unit = "bfloat16" if recipe.train.precision == "bf16" else "float32"
    share = None
    if peaks is not None:
        share = work / times["ours"]["median"] / peaks.flops_per_s[unit]
    faster = None
    if "plain" in times:
        faster = times["plain"]["median"] / times["ours"]["median"]
    on_gpu = device.type == "cuda"
    return {
        "longest_kernels": {side: kernels(step) for side, step in sides.items() if on_gpu},
        "audio_s_per_s": {side: audio_s / t["median"] for side, t in times.items()},
        "step_s": times,
        "first_step_s": first_step_s,
        "times_as_fast_as_plain": faster,
        "peak_memory_mb": {side: round(value / 1e6) for side, value in memory.items()},
        "tflop_per_s": work / times["ours"]["median"] / 1e12,
        "share_of_peak": share,
        "longest_ops": {
            side: breakdown(step, device, recipe.train.precision) for side, step in sides.items()
        },
    }


def show(title: str, found: dict) -> None:
    """A few lines for a reader."""
    rate, faster = found["audio_s_per_s"], found["times_as_fast_as_plain"]
    share = "" if found["share_of_peak"] is None else f", {found['share_of_peak']:.0%} of the peak"
    beside = "plain out of memory"
    if faster is not None:
        beside = f"plain {rate['plain']:.1f}, {faster:.2f} times as fast"
    print(
        f"{title}: ours {rate['ours']:.1f} audio s/s{share}, {beside}, peak memory "
        f"{found['peak_memory_mb']} MB, first step {found['first_step_s']:.0f} s"
    )
    for side, ops in found["longest_ops"].items():
        print(f"  {side}: " + ", ".join(f"{op['op']} {op['share']:.0%}" for op in ops))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--rows", type=int, help="utterances in a batch")
    parser.add_argument("--seconds", type=float, help="of each utterance")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compile our networks")
    parser.add_argument("--cuda-graphs", action="store_true", help="and replay them as CUDA graphs")
    parser.add_argument("--skip-proof", action="store_true", help="measure without the proof")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    need_device(options.device)
    device = torch.device(options.device)
    for precision in options.precision:
        if precision == "bf16" and options.device == "cpu" and bf16_slowdown():
            print("bf16 left out: this CPU does not multiply bfloat16")
            continue
        preset, settings = PRESETS[options.preset](), {"precision": precision}
        settings |= {"compile": options.compile, "cuda_graphs": options.cuda_graphs}
        recipe = sized(preset, options.rows, options.seconds, **settings)
        seconds = recipe.data.max_segment_s
        rows = round(recipe.data.batch_s / seconds)
        corpus = SyntheticCorpus(4 * rows, seconds)
        small = sized(preset, min(rows, PROOF_ROWS), seconds, **settings)
        proofs = {} if options.skip_proof else dict.fromkeys(("fp32", precision))
        proofs = {name: prove(small, corpus, device, name) for name in proofs}
        found = measure(recipe, rows, seconds, device, options.repeats)
        show(f"{options.preset}, {rows} x {seconds:g} s, {precision}", found)
        line = {"name": "train_step", "preset": options.preset, "precision": precision}
        line |= {"shape": {"rows": rows, "seconds": seconds}, "compile": options.compile}
        line |= {"cuda_graphs": options.cuda_graphs, "unproven_kernels": fused.uses_unproven}
        line |= {"losses_ours_plain": proofs, "repeats": options.repeats}
        append("train", {**line, **found, **surroundings(options.device)}, options.out)


if __name__ == "__main__":
    main()
