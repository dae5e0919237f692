"""Batches of audio in step order, decoded and prepared by worker processes.

Batch `step` depends on the plan and the step alone: not on the number of workers, nor on where
the loader began. So a run resumes at any step with no state but the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.data.audio import AudioError
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.batches import EMPTY, BatchPlan, BatchRows, rank_rows
from gmm_jepa.data.rejects import Reject
from gmm_jepa.data.slots import Room, Sent, Slots
from gmm_jepa.data.workers import WorkerError, map_in_order
from gmm_jepa.errors import InputError

_SLOT_WAVEFORMS = 4  # what a slot has room for: the clean one, and all that `prepare` makes of it
_HELD_BATCHES = 2  # the consumer has one while it asks for the next


@dataclass
class Batch:
    """One rank's rows of a global batch (B rows of S samples).

    Attributes:
        step: over all epochs.
        epoch: from 0.
        waveform: (B, S) float32, clean audio at 16 kHz, zeros after a row's end.
        lengths_samples: (B,) int64; 0 in an empty row and in one that could not be read.
        utterance: (B,) int64, its number in the corpus; -1 in an empty row.
        start_samples: (B,) int64, where in its utterance a row begins.
        rows: (B,) int64, the row's number in the global batch.
        n_global_rows: rows of the global batch.
        extras: what `prepare` gave for these rows, arrays as tensors.
        rejects: rows that could not be read.
        wait_s: seconds that the consumer waited for this batch.
    """

    step: int
    epoch: int
    waveform: Tensor
    lengths_samples: Tensor
    utterance: Tensor
    start_samples: Tensor
    rows: Tensor
    n_global_rows: int
    extras: dict[str, Any] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    wait_s: float = 0.0

    def pin_memory(self) -> Batch:
        """A copy whose tensors, `extras` included, are page-locked."""
        return replace(
            self,
            waveform=self.waveform.pin_memory(),
            lengths_samples=self.lengths_samples.pin_memory(),
            utterance=self.utterance.pin_memory(),
            start_samples=self.start_samples.pin_memory(),
            rows=self.rows.pin_memory(),
            extras={
                key: value.pin_memory() if isinstance(value, Tensor) else value
                for key, value in self.extras.items()
            },
        )


class RankView:
    """What `prepare` sees of a step: this rank's audio, and the plan of the whole batch.

    Draws made for all global rows and then cut with `take` do not depend on the number of ranks.
    Planned lengths do not know of rows that fail to decode; `held_samples` does, for own rows.

    Attributes:
        plan: the global batch as planned: utterance, start_samples, n_samples (each (R,)).
        rows: (B,) this rank's row numbers; from R on: empty rows.
        waveform: (B, S) float32, clean. To be left as it is: it goes into the batch.
        held_samples: (B,) int64, lengths as read (0 where reading failed).
    """

    def __init__(self, corpus: Corpus, plan: BatchRows, rank: int, world_size: int, room: Room):
        self.plan = plan
        self.rows = rank_rows(len(plan.utterance), rank, world_size)
        self.rejects: list[Reject] = []
        self._corpus, self._room = corpus, room
        self.waveform = self.empty((len(self.rows), plan.padded_samples))
        self.held_samples = np.zeros(len(self.rows), np.int64)
        for place, row in enumerate(self.rows):
            n_samples = self._decode(int(row), self.waveform[place])
            self.waveform[place, n_samples:] = 0
            self.held_samples[place] = n_samples
        self._places = {int(row): place for place, row in enumerate(self.rows)}

    @property
    def step(self) -> int:
        """The step, over all epochs."""
        return self.plan.step

    @property
    def n_rows(self) -> int:
        """Rows of the global batch, R."""
        return len(self.plan.utterance)

    @property
    def lengths_samples(self) -> np.ndarray:
        """(R,) int64: planned lengths of all global rows, 0 for empty ones."""
        return self.plan.n_samples

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32, not filled: where arrays of a waveform's size that `prepare` returns are made.

        Others are copied on their way to the main process.
        """
        return self._room.empty(shape).numpy()

    def take(self, values: np.ndarray, fill: float = 0) -> np.ndarray:
        """This rank's rows of something drawn for all: (R, ...) to (B, ...)."""
        values = np.asarray(values)
        taken = np.full((len(self.rows), *values.shape[1:]), fill, values.dtype)
        inside = self.rows < len(values)
        taken[inside] = values[self.rows[inside]]
        return taken

    def read_row(self, row: int) -> np.ndarray:
        """The clean audio of any global row: (n,) float32, n = 0 for an empty or unreadable one."""
        place = self._places.get(row)
        if place is not None:
            return self.waveform[place, : self.held_samples[place]]
        signal = np.empty(self.plan.padded_samples, np.float32)
        return signal[: self._decode(row, signal)]

    def _decode(self, row: int, out: np.ndarray) -> int:
        """Fill the beginning of (S,) `out` with a row; how many samples it has, 0 if unreadable."""
        if row >= self.n_rows or self.plan.utterance[row] == EMPTY:
            return 0
        utterance = int(self.plan.utterance[row])
        start, n = int(self.plan.start_samples[row]), int(self.plan.n_samples[row])
        try:
            self._corpus.read_into(utterance, start, out[:n])
        except AudioError as error:
            self.rejects.append(self._corpus.reject(utterance, error))
            return 0
        return n


Prepare = Callable[[RankView], dict[str, Any]]


def make_loader(
    corpus: Corpus,
    plan: BatchPlan,
    *,
    start_step: int = 0,
    stop_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    prepare: Prepare | None = None,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches for steps `start_step` to `stop_step` - 1, in order.

    Every rank gets the same number of batches, of the same shapes. A row that cannot be read
    becomes an empty row, and a record in `Batch.rejects`. Closing the iterator, or leaving the
    loop over it, ends the workers.

    Args:
        corpus: the plan's utterances.
        plan: what is in each step.
        start_step: first step.
        stop_step: one past the last.
        rank: of this process; it takes rows rank, rank + world_size, ...
        world_size: processes that share a global batch.
        workers: decoding processes; 0 decodes here. They use one thread each.
        prepare: called in the worker for each step; what it returns (arrays or tensors for this
            rank's rows, or plain values) becomes `Batch.extras`. A pure function of what it is
            given. Picklable where workers are spawned.
        prefetch: batches each worker runs ahead.
        pin_memory: page-lock tensors (CUDA only).
        start_method: of the worker processes; None is the platform's.

    Raises:
        InputError: an argument is out of its range; `prepare` raised one; a worker could not start.
        WorkerError: something else failed in a worker; the message names the step.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be in 0..world_size - 1, got {rank} of {world_size}")
    if not 0 <= start_step <= stop_step:
        raise InputError(f"steps must run forwards from 0, got {start_step} to {stop_step}")
    n_samples = max(-(-rows // world_size) * samples for rows, samples in plan.shapes)
    n_bytes = _SLOT_WAVEFORMS * 4 * n_samples
    slots = Slots(max(1, workers), prefetch + _HELD_BATCHES, n_bytes)
    batches = map_in_order(
        _MakeBatch(corpus, plan, rank, world_size, prepare, slots),
        range(start_step, stop_step),
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        start_method=start_method,
    )
    return _timed(batches)


def _timed(batches: Iterator[Batch | Sent]) -> Iterator[Batch]:
    try:
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, Sent):
                batch = _opened(batch)
            batch.wait_s = time.perf_counter() - begin
            yield batch
    finally:
        batches.close()


def _opened(sent: Sent) -> Batch:
    try:
        return sent.open()
    except (RuntimeError, OSError, EOFError) as error:
        # what found no room in its slot comes by a connection to its worker
        raise WorkerError(f"a loader worker died: {error}") from None


class _MakeBatch:
    """One step of one rank; what the workers run."""

    def __init__(
        self,
        corpus: Corpus,
        plan: BatchPlan,
        rank: int,
        world_size: int,
        prepare: Prepare | None,
        slots: Slots,
    ):
        self._corpus, self._plan, self._prepare = corpus, plan, prepare
        self._rank, self._world_size = rank, world_size
        self._slots = slots

    def __call__(self, step: int) -> Batch | Sent:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self._make(step, self._slots.borrow())
        room = self._slots.take(worker.id)
        return self._slots.send(self._make(step, room), room)

    def _make(self, step: int, room: Room) -> Batch:
        planned = self._plan.batch(step)
        view = RankView(self._corpus, planned, self._rank, self._world_size, room)
        extras = self._prepare(view) if self._prepare is not None else {}
        return Batch(
            step=step,
            epoch=planned.epoch,
            waveform=torch.from_numpy(view.waveform),
            lengths_samples=torch.from_numpy(view.held_samples),
            utterance=torch.from_numpy(view.take(planned.utterance, EMPTY)),
            start_samples=torch.from_numpy(view.take(planned.start_samples)),
            rows=torch.from_numpy(view.rows),
            n_global_rows=view.n_rows,
            extras={key: _as_tensor(value) for key, value in extras.items()},
            rejects=view.rejects,
        )


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
