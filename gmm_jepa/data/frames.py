"""Log-mel frames of a corpus as a stream that can be read again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.data.base import Corpus
from gmm_jepa.data.windows import Window, WindowStream, read_ahead
from gmm_jepa.features import LogMelSpec, log_mel, log_mel_frames


class LogMelStream(WindowStream):
    """Re-iterable batches of log-mel frames, as `GaussianMixture.fit` takes them.

    Args:
        corpus: the audio.
        spec: the front end.
        options: see `WindowStream`.
    """

    def __init__(self, corpus: Corpus, spec: LogMelSpec, **options: Any) -> None:
        self.spec = spec
        super().__init__(corpus, hop_samples=spec.hop_samples, width=spec.n_mels, **options)

    def frames(self, waveform: Tensor) -> Tensor:
        """(S,) -> (n, n_mels)."""
        return log_mel(waveform, spec=self.spec)

    def frame_counts(self, n_samples: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
        """As many in all windows of an utterance as of it whole: a frame at a cut is the next's."""
        return np.where(is_cut, self._window_frames, log_mel_frames(n_samples, self.spec))

    @property
    def _window_frames(self) -> int:
        return self.window_samples // self.spec.hop_samples

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


def draw_frames(n_frames: int, n_wanted: int, *, seed: int) -> np.ndarray:
    """Numbers, ascending, of `n_wanted` of `n_frames` frames drawn uniformly; all if fewer."""
    if n_frames <= n_wanted:
        return np.arange(n_frames)
    random = np.random.default_rng(seed)
    return np.sort(random.choice(n_frames, n_wanted, replace=False, shuffle=False))
