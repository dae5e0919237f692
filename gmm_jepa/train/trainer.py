"""The training loop, from top to bottom: model, data, steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from gmm_jepa.config import Iteration, Recipe, TrainConfig
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.data.loader import Batch, make_loader
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.distributed import Processes
from gmm_jepa.objectives.batch import Losses, MaskedBatch
from gmm_jepa.objectives.build import Labels
from gmm_jepa.objectives.prepare import MaskAndDisturb, micro_batches
from gmm_jepa.objectives.schedules import Schedule, schedule_at
from gmm_jepa.train.advice import on_batches
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.log import training_log
from gmm_jepa.train.profile import StepProfile
from gmm_jepa.train.sharding import gradient_sync
from gmm_jepa.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a training ended."""

    steps_done: int
    """Optimiser steps in the last checkpoint."""
    finished: bool
    """False if it was asked to stop, be it in the last step."""


def train(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    labels: Labels,
    peers: Processes,
    *,
    iteration: Iteration,
    rejects: RejectLog,
    profile: Path | None = None,
) -> TrainOutcome:
    """Train until the iteration's last step, SIGTERM or Ctrl-C; go on from the newest checkpoint.

    On one machine with one number of threads the same recipe gives the same losses bit for bit,
    however often it was interrupted: batches, masks, noise and dropout depend on the step alone.

    Args:
        folder: of the run; checkpoints and metrics are written there by the main process.
        recipe: all settings.
        corpus: training audio.
        labels: what was fitted for this iteration.
        peers: this process among its peers.
        iteration: the part of the run to train, from a new model.
        rejects: where unusable audio is recorded.
        profile: folder for a profile of a few early steps; None: no profile.

    Raises:
        InputError: a damaged checkpoint, too much unusable audio, or ten steps in a row without a
            finite gradient.
    """
    config = recipe.train
    # Model
    state = TrainState(recipe, labels, peers, first_step=iteration.first_step)
    state.resume(folder.checkpoints)
    state.model.train()
    start = state.step
    if start >= iteration.stop_step:
        return TrainOutcome(steps_done=start, finished=True)

    # Data
    batches = _batches(corpus, recipe, peers, start, iteration.stop_step)

    # Steps
    unread: list[Reject] = []
    n_rejects_before = rejects.count
    with (
        contextlib.closing(batches),
        training_log(folder, start, recipe, peers) as log,
        _stop_signal() as stop_asked,
        _profile_of(profile, recipe, peers) as profiler,
    ):
        for batch in batches:
            schedule = training_step(state, batch, recipe, peers)
            if profiler is not None:
                profiler.after_step()
            unread += batch.rejects

            last = state.step == iteration.stop_step
            due = last or state.step % config.log_every == 0
            # Processes get a signal at different steps; they agree where they meet anyway.
            stop = (due or peers.world_size == 1) and peers.any(stop_asked.is_set())
            saves = last or stop or state.step % config.checkpoint_every == 0
            if due or saves:  # who goes on from a checkpoint does not meet them again
                rejects.extend(peers.gather(unread))
                unread.clear()
            if due:
                log(state.step, {**state.meters.read(), **schedule.metrics()})
                n_bad = rejects.count - n_rejects_before
                rejects.check(len(corpus), recipe.data.max_bad_fraction, n_bad=n_bad)
            if saves:
                state.save(folder.checkpoints, keep=config.keep_checkpoints)
            if stop:
                break
        stop = stop or peers.any(stop_asked.is_set())  # while the last checkpoint was written
    return TrainOutcome(steps_done=state.step, finished=last and not stop)


def training_step(state: TrainState, batch: Batch, recipe: Recipe, peers: Processes) -> Schedule:
    """One optimiser step on a global batch, nothing read back from the device.

    Returns:
        The scheduled values of the step.
    """
    schedule = schedule_at(recipe, state.step)
    _accumulate(state, batch, schedule, recipe, peers)
    norm, skipped = state.update(schedule, recipe.train.clip_norm)
    audio_s = batch.extras["audio_s"]
    state.meters.add_step(norm, skipped, audio_s=audio_s, waited_s=batch.wait_s)
    return schedule


def _batches(
    corpus: Corpus, recipe: Recipe, peers: Processes, start_step: int, stop_step: int
) -> Iterator[Batch]:
    """This process's batches of the steps, masked and disturbed."""
    plan = batch_plan(corpus, recipe)
    peers.say(*on_batches(plan, peers.world_size))
    return make_loader(
        corpus,
        plan,
        start_step=start_step,
        stop_step=stop_step,
        rank=peers.rank,
        world_size=peers.world_size,
        workers=recipe.data.workers,
        pin_memory=peers.device.type == "cuda",
        prepare=MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=recipe.seed),
    )


def batch_plan(corpus: Corpus, recipe: Recipe) -> BatchPlan:
    """The batches of a run."""
    rate_hz = recipe.front_end.sample_rate_hz
    return BatchPlan(
        corpus.durations_samples,
        corpus.weights,
        seed=recipe.seed,
        batch_samples=round(recipe.data.batch_s * rate_hz),
        max_samples=round(recipe.data.max_segment_s * rate_hz),
        min_samples=round(recipe.data.min_segment_s * rate_hz),
        n_buckets=recipe.data.n_buckets,
    )


def _accumulate(
    state: TrainState, batch: Batch, schedule: Schedule, recipe: Recipe, peers: Processes
) -> None:
    """Gradients and meters of one global batch, in micro-batches."""
    weight = recipe.objective.unmasked_weight
    parts = list(micro_batches(batch, recipe.train.accumulate, unmasked_weight=weight))
    for _ in range(state.n_rehearsals):
        no_target_moves = schedule._replace(step=-1)
        _backward(state, parts[0], no_target_moves, recipe.train, peers)
        state.forget_rehearsal()
    torch.manual_seed(_dropout_seed(recipe.seed, state.step, peers.rank))
    for part in parts:
        with gradient_sync(state.forward, wanted=part is parts[-1]):
            losses = _backward(state, part, schedule, recipe.train, peers)
        state.meters.add_losses(losses)


def _backward(
    state: TrainState, part: MaskedBatch, schedule: Schedule, config: TrainConfig, peers: Processes
) -> Losses:
    """Losses of a micro-batch; its gradients are added to those that are there."""
    if config.cuda_graphs:  # what the graphs of the part before left is no longer needed
        torch.compiler.cudagraph_mark_step_begin()
    with _precision(config, peers.device):
        losses = state.forward(state.copied(part), schedule)
    # Gradients are averaged over the processes, but the losses are parts of a sum.
    (losses.total * peers.world_size).backward()
    return losses


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _precision(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _profile_of(
    folder: Path | None, recipe: Recipe, peers: Processes
) -> contextlib.AbstractContextManager[StepProfile | None]:
    """The main process's steps are profiled where a folder is given."""
    if folder is None or not peers.is_main:
        return contextlib.nullcontext()
    return StepProfile(folder, peers.device, recipe.train.precision)


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; the second Ctrl-C ends the process at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(_number: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
