"""Log-mel frames of a corpus as a stream that can be read again and again."""

from __future__ import annotations

from collections.abc import Iterator

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
        rank: of this process; it reads utterances rank, rank + world_size, ... of those drawn.
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
        self.utterances = drawn[rank::world_size]
        self.device = torch.device(device)
        self.n_frames = int(log_mel_frames(durations[self.utterances], spec).sum())
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

    def _batches(self) -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        n_frames = 0
        for waveform in self._windows():
            samples = torch.from_numpy(waveform).to(self.device)
            waiting.append(log_mel(samples, spec=self.spec))
            n_frames += len(waiting[-1])
            if n_frames >= BATCH_FRAMES:
                yield torch.cat(waiting)
                waiting, n_frames = [], 0
        if waiting:
            yield torch.cat(waiting)

    def _windows(self) -> Iterator[np.ndarray]:
        window = round(WINDOW_S * self.spec.sample_rate_hz)
        for i in self.utterances:
            duration = int(self.corpus.durations_samples[i])
            for start in range(0, duration, window):
                try:
                    yield self.corpus.read(int(i), start, min(window, duration - start))
                except AudioError as error:
                    self.rejects.extend([self.corpus.reject(int(i), error)])
                    break


def draw_utterances(durations_samples: np.ndarray, max_samples: float, *, seed: int) -> np.ndarray:
    """Indices, in order, of a random choice of utterances that together last `max_samples` or less.

    All of them if they fit; at least one if there is any.
    """
    if durations_samples.sum() <= max_samples:
        return np.arange(len(durations_samples))
    order = np.random.default_rng(seed).permutation(len(durations_samples))
    n_fitting = int(np.searchsorted(np.cumsum(durations_samples[order]), max_samples, "right"))
    return np.sort(order[: max(n_fitting, 1)])
