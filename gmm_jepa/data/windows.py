"""Windows of a corpus's utterances, dealt to processes, read ahead and turned into frames."""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.rejects import RejectLog

WINDOW_S = 60.0
"""Longer utterances are read in windows of this length, so that memory is bounded."""
BATCH_FRAMES = 16_384
"""Frames in a batch, about: large enough for matrix products, 5 MB at 80 bands."""
CACHE_BYTES = 2**30
"""A stream that is smaller than this stays in memory after its first pass."""
READERS = 2
"""Threads that decode and transform ahead of the caller."""
WINDOWS_AHEAD = 8
"""Windows that are read ahead: 31 MB of audio and 8 MB of frames at 80 bands, at most."""

NUMBERS_AT_ONCE = 1 << 16
"""Of windows that a process finds its own among, so that a corpus's are never all in memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Window(NamedTuple):
    """A piece of an utterance that is read at once."""

    utterance: int
    start_samples: int
    n_samples: int
    n_frames: int


class WindowStream(ABC):
    """Re-iterable batches of the frames of a corpus, as the estimators' `fit` takes them.

    Padding never occurs: utterances are transformed one by one. Audio that cannot be read is
    recorded and left out. A subclass says what a window's frames are, and how many.

    Args:
        corpus: the audio.
        hop_samples: between frames; windows are whole multiples of it.
        width: of a frame.
        rejects: where unreadable audio is recorded.
        max_s: audio seconds at most; if the corpus has more, utterances are drawn evenly from it.
        seed: of that draw.
        rank: of this process; it reads windows rank, rank + world_size, ... of those drawn.
        world_size: processes that share the work.
        device: where the frames are computed and stay.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        hop_samples: int,
        width: int,
        rejects: RejectLog,
        max_s: float = float("inf"),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.corpus, self.rejects = corpus, rejects
        self.drawn = draw_utterances(corpus.durations_samples, max_s * SAMPLE_RATE_HZ, seed=seed)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device = torch.device(device)
        self.window_samples = int(WINDOW_S * SAMPLE_RATE_HZ) // hop_samples * hop_samples
        self._rejecting = threading.Lock()
        self.n_frames = self._count()
        is_small = 4 * self.n_frames * width <= CACHE_BYTES
        self._cache: list[Tensor] | None = [] if is_small else None
        self._complete = False

    @abstractmethod
    def frames(self, waveform: Tensor) -> Tensor:
        """(S,) float32 on the device -> (n, width); called by several threads at once."""

    @abstractmethod
    def frame_counts(self, n_samples: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
        """How many of a window's frames, the first ones, are taken.

        Args:
            n_samples: (n,) of windows.
            is_cut: (n,) bool, where another window of the same utterance follows.
        """

    def __iter__(self) -> Iterator[Tensor]:
        """(n, width) float32 tensors, about `BATCH_FRAMES` rows each, in the same order always."""
        if self._complete:
            assert self._cache is not None
            yield from self._cache
            return
        kept: list[Tensor] = []
        for batch in self._batches():
            if self._cache is not None:
                kept.append(batch)
            yield batch
        if self._cache is not None:
            self._cache, self._complete = kept, True

    def _batches(self) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        n_frames = 0
        for frames in read_ahead(self._frames_of, self._own()):
            if frames is None:
                continue
            waiting.append(frames)
            n_frames += len(frames)
            if n_frames >= BATCH_FRAMES:
                yield torch.cat(waiting)
                waiting, n_frames = [], 0
        if waiting:
            yield torch.cat(waiting)

    def _frames_of(self, window: Window) -> Tensor | None:
        """The frames of a window; None if there are none, or it cannot be read."""
        waveform = self._read(window) if window.n_frames else None
        if waveform is None:
            return None
        return self.frames(torch.from_numpy(waveform).to(self.device))[: window.n_frames]

    def _own(self) -> Iterator[Window]:
        """This process's windows of the utterances drawn."""
        return (window for *_, window in self._own_windows(self.drawn))

    def _own_windows(self, utterances: np.ndarray) -> Iterator[tuple[int, int, Window]]:
        """Places of utterances, numbers in them, and windows: every so many-th of all of them."""
        for places, numbers, n_samples, n_frames in self._dealt(utterances):
            starts = numbers * self.window_samples
            for place, w, *window in zip(
                places.tolist(),
                numbers.tolist(),
                utterances[places].tolist(),
                starts.tolist(),
                n_samples.tolist(),
                n_frames.tolist(),
            ):
                yield place, w, Window(*window)

    def _count(self) -> int:
        """Frames of this process's windows."""
        return sum(int(n_frames.sum()) for *_, n_frames in self._dealt(self.drawn))

    def _dealt(
        self, utterances: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """This process's windows, a part of them at a time.

        Yields:
            places of their utterances, their numbers in these, their samples and their frames;
            each (n,).
        """
        n_windows = self._n_windows(utterances)
        ends = np.cumsum(n_windows)
        for own in _in_parts(self.rank, int(ends[-1]) if len(ends) else 0, self.world_size):
            places = np.searchsorted(ends, own, side="right")
            numbers = own - ends[places] + n_windows[places]
            durations = self.corpus.durations_samples[utterances[places]]
            rests = durations - numbers * self.window_samples
            n_samples = np.minimum(rests, self.window_samples)
            yield places, numbers, n_samples, self.frame_counts(n_samples, rests > n_samples)

    def _n_windows(self, utterances: np.ndarray) -> np.ndarray:
        return -(-self.corpus.durations_samples[utterances] // self.window_samples)

    def _read(self, window: Window) -> np.ndarray | None:
        try:
            return self.corpus.read(*window[:3])
        except AudioError as error:
            with self._rejecting:  # several threads read
                self.rejects.add(self.corpus.reject(window.utterance, error))
            return None


def _in_parts(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
    """The numbers of a range, `NUMBERS_AT_ONCE` at a time."""
    for first in range(start, stop, NUMBERS_AT_ONCE * step):
        yield np.arange(first, min(first + NUMBERS_AT_ONCE * step, stop), step)


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``function(item)`` of all items, in order, computed by threads ahead of the caller.

    Not more than `WINDOWS_AHEAD` results wait. Decoding and transforms leave Python's lock, so
    they run while the caller computes.
    """
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead") as pool:
        try:
            for item in itertools.islice(source, WINDOWS_AHEAD):
                waiting.append(pool.submit(function, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(source, 1):
                    waiting.append(pool.submit(function, item))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def draw_utterances(durations_samples: np.ndarray, max_samples: float, *, seed: int) -> np.ndarray:
    """Indices, in order, of a random choice of utterances that together last `max_samples` or less.

    All of them if they fit; at least one if there is any.
    """
    if durations_samples.sum() <= max_samples:
        return np.arange(len(durations_samples))
    order = np.random.default_rng(seed).permutation(len(durations_samples))
    n_fitting = int(np.searchsorted(np.cumsum(durations_samples[order]), max_samples, "right"))
    return np.sort(order[: max(n_fitting, 1)])
