"""Log-mel frames of a corpus as a stream that can be read again and again."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.data.audio import AudioError
from gmm_jepa.data.corpus import Corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.features import LogMelSpec, log_mel, log_mel_frames

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

Item = TypeVar("Item")
Result = TypeVar("Result")


class Window(NamedTuple):
    """A piece of an utterance that is read at once."""

    utterance: int
    start_samples: int
    n_samples: int
    n_frames: int


class LogMelStream:
    """Re-iterable batches of log-mel frames, as `GaussianMixture.fit` takes them.

    Padding never occurs: utterances are transformed one by one. Audio that cannot be read is
    recorded and left out.

    Args:
        corpus: the audio.
        spec: the front end.
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
        spec: LogMelSpec,
        *,
        rejects: RejectLog,
        max_s: float = float("inf"),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.corpus = corpus
        self.spec = spec
        self.rejects = rejects
        durations = corpus.durations_samples
        drawn = draw_utterances(durations, max_s * spec.sample_rate_hz, seed=seed)
        self.drawn = drawn
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device = torch.device(device)
        self._rejecting = threading.Lock()
        self._window_frames = int(WINDOW_S * spec.sample_rate_hz) // spec.hop_samples
        self.n_frames = self._count(self._window_frames, lambda n: log_mel_frames(n, spec))
        n_bytes = self.n_frames * spec.n_mels * 4
        self._cache: list[Tensor] | None = [] if n_bytes <= CACHE_BYTES else None
        self._complete = False

    def __iter__(self) -> Iterator[Tensor]:
        """(n, n_mels) float32 tensors, about `BATCH_FRAMES` rows each, in the same order always."""
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

    def mini_batches(self, n_frames: int, *, first: int = 0) -> Iterator[Iterator[Tensor]]:
        """One pass in random order, cut into mini-batches; each is an iterator of (n, n_mels).

        What belongs to a mini-batch does not depend on the number of processes: each gives its
        share of it, maybe none. Every mini-batch is to be used up before the next.

        Args:
            n_frames: frames of a mini-batch over all processes, about.
            first: mini-batch to begin at, without reading those before it.
        """
        order = np.random.default_rng(self.seed).permutation(self.drawn)
        ends = np.cumsum(log_mel_frames(self.corpus.durations_samples[order], self.spec))
        number = (ends - 1) // n_frames
        number = np.unique(number, return_inverse=True)[1]  # long utterances leave gaps
        tagged = ((number[p], w) for p, _, w in self._own_windows(order) if number[p] >= first)
        frames = read_ahead(lambda item: (item[0], self._frames_of(item[1])), tagged)
        groups = itertools.groupby(frames, key=lambda item: item[0])
        group = next(groups, None)
        for n in range(first, self.n_mini_batches(n_frames)):
            if group is None or group[0] != n:
                yield iter(())
                continue
            yield (part for _, part in group[1] if part is not None)
            group = next(groups, None)

    def n_mini_batches(self, n_frames: int) -> int:
        """How many `mini_batches` gives."""
        order = np.random.default_rng(self.seed).permutation(self.drawn)
        ends = np.cumsum(log_mel_frames(self.corpus.durations_samples[order], self.spec))
        return len(np.unique((ends - 1) // n_frames))

    def sample(self, n_frames: int) -> tuple[Tensor, Tensor]:
        """This process's part of a uniform sample without replacement over all processes' frames.

        Only the windows that hold drawn frames are read. Frames of audio that cannot be read are
        left out.

        Returns:
            rows (n, n_mels) on the CPU, n the lesser of `n_frames` and of all frames, in the order
            of the corpus, and (n,) bool which of them this process has; the others are zero. So
            the sum over processes is the whole sample, whatever their number.
        """
        ends = np.cumsum(log_mel_frames(self.corpus.durations_samples[self.drawn], self.spec))
        drawn = draw_frames(int(ends[-1]) if len(ends) else 0, n_frames, seed=self.seed)
        place = np.searchsorted(ends, drawn, side="right")
        within = drawn - np.concatenate(([0], ends))[place]
        rows = torch.zeros(len(drawn), self.spec.n_mels)
        found = torch.zeros(len(drawn), dtype=torch.bool)
        wanted = self._wanted_windows(place, within)
        for (at, inside, _), frames in read_ahead(
            lambda item: (item, self._frames_of(item[2])), wanted
        ):
            if frames is not None:
                rows[at], found[at] = frames[inside].cpu(), True
        return rows, found

    def _wanted_windows(
        self, place: np.ndarray, within: np.ndarray
    ) -> Iterator[tuple[Tensor, Tensor, Window]]:
        """Rows of the sample, their frames inside a window, and the window; of this process."""
        wanted, starts = np.unique(place, return_index=True)
        ends = np.append(starts, len(place))
        n_windows = self._n_windows(self.drawn[wanted])
        for p, w, window in self._own_windows(self.drawn[wanted]):
            rows = np.arange(ends[p], ends[p + 1])
            number = np.minimum(within[rows] // self._window_frames, n_windows[p] - 1)
            at = rows[number == w]
            if len(at):
                inside = within[at] - w * self._window_frames
                yield torch.from_numpy(at), torch.from_numpy(inside), window

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
        """Log-mel of a window; None if it cannot be read."""
        waveform = self._read(window)
        if waveform is None:
            return None
        frames = log_mel(torch.from_numpy(waveform).to(self.device), spec=self.spec)
        return frames[: window.n_frames]

    def _windows(self) -> Iterator[np.ndarray]:
        """The waveforms of all windows that can be read, decoded ahead."""
        for waveform in read_ahead(self._read, self._own()):
            if waveform is not None:
                yield waveform

    def _own(self) -> Iterator[Window]:
        """This process's windows of the utterances drawn."""
        return (window for *_, window in self._own_windows(self.drawn))

    def _own_windows(self, utterances: np.ndarray) -> Iterator[tuple[int, int, Window]]:
        """Place of the utterance, number in it, window: of every so many-th one over all of them.

        The windows of an utterance have together as many frames as the utterance whole: the frame
        at a cut belongs to the window that it begins.
        """
        length = self._window_samples
        for places, numbers, rests in self._dealt(utterances):
            for place, w, rest in zip(places.tolist(), numbers.tolist(), rests.tolist()):
                is_cut = rest > length
                n_frames = self._window_frames if is_cut else int(log_mel_frames(rest, self.spec))
                window = Window(int(utterances[place]), w * length, min(length, rest), n_frames)
                yield place, w, window

    def _count(self, n_whole: int, n_last: Callable[[np.ndarray], np.ndarray]) -> int:
        """Frames of this process's windows.

        Args:
            n_whole: of a window that others of its utterance follow.
            n_last: takes the samples of utterances' last windows (n,) and gives their frames.
        """
        total = 0
        for *_, rests in self._dealt(self.drawn):
            last = rests[rests <= self._window_samples]
            total += (len(rests) - len(last)) * n_whole + int(n_last(last).sum())
        return total

    def _dealt(self, utterances: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """This process's windows, a part of them at a time.

        Yields:
            places of their utterances, their numbers in these, and samples from where they begin
            to the utterance's end; each (n,).
        """
        n_windows = self._n_windows(utterances)
        ends = np.cumsum(n_windows)
        for own in _in_parts(self.rank, int(ends[-1]) if len(ends) else 0, self.world_size):
            places = np.searchsorted(ends, own, side="right")
            numbers = own - ends[places] + n_windows[places]
            durations = self.corpus.durations_samples[utterances[places]]
            yield places, numbers, durations - numbers * self._window_samples

    @property
    def _window_samples(self) -> int:
        return self._window_frames * self.spec.hop_samples

    def _n_windows(self, utterances: np.ndarray) -> np.ndarray:
        return -(-self.corpus.durations_samples[utterances] // self._window_samples)

    def _read(self, window: Window) -> np.ndarray | None:
        try:
            return self.corpus.read(*window[:3])
        except AudioError as error:
            with self._rejecting:  # several threads read
                self.rejects.extend([self.corpus.reject(window.utterance, error)])
            return None


def _in_parts(start: int, stop: int, step: int, *, n: int = 1 << 16) -> Iterator[np.ndarray]:
    """The numbers of a range, so many at a time."""
    for first in range(start, stop, n * step):
        yield np.arange(first, min(first + n * step, stop), step)


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int = READERS
) -> Iterator[Result]:
    """``function(item)`` of all items, in order, computed by threads ahead of the caller.

    Not more than `WINDOWS_AHEAD` results wait. Decoding and transforms leave Python's lock, so
    they run while the caller computes.
    """
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") as pool:
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


def draw_frames(n_frames: int, n_wanted: int, *, seed: int) -> np.ndarray:
    """Numbers, ascending, of `n_wanted` of `n_frames` frames drawn uniformly; all if fewer."""
    if n_frames <= n_wanted:
        return np.arange(n_frames)
    random = np.random.default_rng(seed)
    return np.sort(random.choice(n_frames, n_wanted, replace=False, shuffle=False))


def draw_utterances(durations_samples: np.ndarray, max_samples: float, *, seed: int) -> np.ndarray:
    """Indices, in order, of a random choice of utterances that together last `max_samples` or less.

    All of them if they fit; at least one if there is any.
    """
    if durations_samples.sum() <= max_samples:
        return np.arange(len(durations_samples))
    order = np.random.default_rng(seed).permutation(len(durations_samples))
    n_fitting = int(np.searchsorted(np.cumsum(durations_samples[order]), max_samples, "right"))
    return np.sort(order[: max(n_fitting, 1)])
