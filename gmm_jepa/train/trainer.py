"""The training loop, from top to bottom: model, data, steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmm_jepa.config import Recipe, TrainConfig
from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.data.corpus import Corpus
from gmm_jepa.data.loader import Batch, make_loader
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.objectives.gmm_anchored import MaskedBatch
from gmm_jepa.objectives.prepare import MaskAndDisturb, micro_batches
from gmm_jepa.objectives.schedules import interpolate, learning_rate, progress
from gmm_jepa.progress import tqdm_bar
from gmm_jepa.train.distributed import Processes
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import MetricsLog
from gmm_jepa.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """How a training ended."""

    steps_done: int
    """Optimiser steps in the last checkpoint."""
    finished: bool
    """False if it was asked to stop before the last step."""


def train(
    folder: RunFolder,
    recipe: Recipe,
    corpus: Corpus,
    mixture: GaussianMixture,
    peers: Processes,
    *,
    rejects: RejectLog,
) -> TrainOutcome:
    """Train until the recipe's last step, SIGTERM or Ctrl-C; go on from the newest checkpoint.

    On one machine with one number of threads the same recipe gives the same losses bit for bit,
    however often it was interrupted: batches, masks, noise and dropout depend on the step alone.

    Args:
        folder: of the run; checkpoints and metrics are written there by the main process.
        recipe: all settings.
        corpus: training audio.
        mixture: the fitted anchor.
        peers: this process among its peers.
        rejects: where unusable audio is recorded.

    Raises:
        InputError: a damaged checkpoint, too much unusable audio, or ten steps in a row without a
            finite gradient.
    """
    config = recipe.train

    # Model
    state = TrainState(recipe, mixture, peers)
    state.resume(folder.checkpoints)
    state.model.train()
    start = state.step
    if start >= config.steps:
        return TrainOutcome(steps_done=start, finished=True)

    # Data
    plan = batch_plan(corpus, recipe)
    if peers.is_main and plan.n_too_short:
        print(f"{plan.n_too_short} utterances left out: shorter than data.min_segment_s")
    batches = make_loader(
        corpus,
        plan,
        start_step=start,
        stop_step=config.steps,
        rank=peers.rank,
        world_size=peers.world_size,
        workers=recipe.data.workers,
        pin_memory=peers.device.type == "cuda",
        prepare=MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=recipe.seed),
    )

    # Steps
    unread: list[Reject] = []
    with _log_of(folder, start, config, peers) as log, _stop_signal() as stop_asked:
        for batch in batches:
            schedule = training_step(state, batch, recipe, peers)
            unread += batch.rejects

            last = state.step == config.steps
            due = last or state.step % config.log_every == 0
            if due:
                log.write(state.step, {**state.meters.read(), **schedule.metrics()})
                rejects.extend(peers.gather(unread))
                unread.clear()
                if peers.is_main:
                    rejects.check(len(corpus) + rejects.count, recipe.data.max_bad_fraction)
            # Processes get a signal at different steps; they agree where they meet anyway.
            stop = (due or peers.world_size == 1) and peers.any(stop_asked.is_set())
            if last or stop or state.step % config.checkpoint_every == 0:
                state.save(folder.checkpoints, keep=config.keep_checkpoints)
            if stop:
                break
    return TrainOutcome(steps_done=state.step, finished=state.step == config.steps)


class Schedule(NamedTuple):
    """The values that change over a run, at one step."""

    anchor_weight: float
    """lambda."""
    learning_rate: float
    teacher_decay: float

    def metrics(self) -> dict[str, float]:
        """Under their names in the metrics."""
        return {
            "lambda": self.anchor_weight,
            "learning_rate": self.learning_rate,
            "teacher_decay": self.teacher_decay,
        }


def training_step(state: TrainState, batch: Batch, recipe: Recipe, peers: Processes) -> Schedule:
    """One optimiser step on a global batch, nothing read back from the device.

    Returns:
        The scheduled values of the step.
    """
    schedule = _schedule(recipe, state.step)
    _accumulate(state, batch, schedule, recipe, peers)
    norm, skipped = state.update(schedule.learning_rate, recipe.train.clip_norm)
    state.model.update_teacher(schedule.teacher_decay)
    audio_s = batch.extras["audio_s"]
    state.meters.add_step(norm, skipped, audio_s=audio_s, waited_s=batch.wait_s)
    return schedule


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


def _schedule(recipe: Recipe, step: int) -> Schedule:
    """The schedules at `step`, counted from 0."""
    config, objective = recipe.train, recipe.objective
    done = progress(step, config.steps)
    return Schedule(
        interpolate(objective.anchor_start, objective.anchor_end, done, objective.anchor_schedule),
        learning_rate(
            step,
            config.steps,
            peak=config.learning_rate,
            warmup_share=config.warmup_share,
            shape=config.learning_rate_schedule,
        ),
        interpolate(config.teacher_decay_start, config.teacher_decay, done, "linear"),
    )


def _accumulate(
    state: TrainState, batch: Batch, schedule: Schedule, recipe: Recipe, peers: Processes
) -> None:
    """Gradients and meters of one global batch, in micro-batches."""
    config = recipe.train
    torch.manual_seed(_dropout_seed(recipe.seed, state.step, peers.rank))
    weight = recipe.objective.unmasked_weight
    parts = list(micro_batches(batch, config.accumulate, unmasked_weight=weight))
    for part in parts:
        with _gradient_sync(state.forward, wanted=part is parts[-1]):
            with _precision(config, peers.device):
                losses = state.forward(_to_device(part, peers.device), schedule.anchor_weight)
            # DDP averages over the processes, but the losses are parts of a sum.
            (losses.total * peers.world_size).backward()
        state.meters.add_losses(losses)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _to_device(batch: MaskedBatch, device: torch.device) -> MaskedBatch:
    return MaskedBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _precision(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _gradient_sync(forward: nn.Module, *, wanted: bool) -> contextlib.AbstractContextManager:
    """Gradients are summed over the processes with the last micro-batch only."""
    if wanted or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


class _Log:
    """Metrics and progress bar of the main process; silent in the others."""

    def __init__(self, metrics: MetricsLog | None, bar: Any, start: int) -> None:
        self._metrics, self._bar, self._shown = metrics, bar, start

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take in the values of `step` (steps done)."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", kl=f"{values['kl']:.3f}", refresh=False)
        self._bar.update(step - self._shown)
        self._shown = step


@contextlib.contextmanager
def _log_of(folder: RunFolder, start: int, config: TrainConfig, peers: Processes) -> Iterator[_Log]:
    with contextlib.ExitStack() as stack:
        metrics = None
        if peers.is_main:
            metrics = stack.enter_context(
                MetricsLog(folder.metrics, start, tensorboard=config.tensorboard)
            )
        bar = tqdm_bar(
            initial=start,
            total=config.steps,
            desc="training",
            unit="step",
            disable=not peers.is_main,
        )
        yield _Log(metrics, stack.enter_context(bar), start)


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
