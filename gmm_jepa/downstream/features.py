"""Frozen features of a corpus: computed once where they fit, else whenever they are needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.base import Corpus
from gmm_jepa.downstream.upstreams import Upstream
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.embed import length_groups
from gmm_jepa.progress import Bar

_BATCH_S = 32.0
_MIB = 1 << 20


class Features(ABC):
    """All layers of any utterances of a corpus.

    Attributes:
        n_frames: (N,) int64, frames of each utterance.
        shape: (L, D).
    """

    n_frames: NDArray[np.int64]
    shape: tuple[int, int]

    @abstractmethod
    def rows(self, utterances: Sequence[int]) -> list[Tensor]:
        """(T_i, L, D) float32 of each."""

    def batch(self, utterances: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features (B, T, L, D), zero past each end, and lengths (B,) int64 on the CPU."""
        rows = self.rows(utterances)
        lengths = torch.from_numpy(self.n_frames[np.asarray(utterances)])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


class ComputedFeatures(Features):
    """Made by the upstream at every call."""

    def __init__(self, upstream: Upstream, corpus: Corpus) -> None:
        self._upstream, self._corpus = upstream, corpus
        self.shape = (upstream.n_layers, upstream.width)
        durations = corpus.durations_samples.tolist()
        self.n_frames = np.array([upstream.n_frames(n) for n in durations], np.int64)

    def rows(self, utterances: Sequence[int]) -> list[Tensor]:
        """Read, encode."""
        waveforms = [torch.from_numpy(self._corpus.read(int(i))) for i in utterances]
        for i, waveform in zip(utterances, waveforms):
            if not len(waveform):
                raise InputError(f"{self._corpus.locate(int(i))[0]}: zero samples")
        try:
            return self._upstream(waveforms)
        except InputError as error:
            files = ", ".join(self._corpus.locate(int(i))[0] for i in utterances[:3])
            raise InputError(f"{error} (among {files})") from None


class StoredFeatures(Features):
    """Kept in memory or in a file, frames end to end.

    Args:
        computed: what makes them.
        path: a file, or None for memory.
        name: for the progress bar.
        durations_samples: (N,) of the utterances, so that like lengths are encoded together.
    """

    def __init__(
        self,
        computed: ComputedFeatures,
        path: Path | None,
        name: str,
        durations_samples: NDArray[np.int64],
    ) -> None:
        self.n_frames, self.shape = computed.n_frames, computed.shape
        self._offsets = np.concatenate([[0], np.cumsum(self.n_frames)])
        size = (int(self._offsets[-1]), *self.shape)
        if path is None:
            self._values = np.empty(size, np.float32)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._values = np.lib.format.open_memmap(path, "w+", np.float32, size)
        done = 0
        with Bar(f"features of {name}", "utterance") as bar:
            for group in length_groups(durations_samples, _BATCH_S * SAMPLE_RATE_HZ):
                for i, rows in zip(group, computed.rows(group)):
                    self._values[self._offsets[i] : self._offsets[i + 1]] = rows.cpu().numpy()
                done += len(group)
                bar(done, len(self.n_frames))

    def rows(self, utterances: Sequence[int]) -> list[Tensor]:
        """Views."""
        return [
            torch.from_numpy(self._values[self._offsets[i] : self._offsets[i + 1]])
            for i in utterances
        ]


def open_features(
    upstream: Upstream, corpus: Corpus, *, memory_mib: float, disk_mib: float, path: Path
) -> Features:
    """Features of a corpus: in memory if they fit, else in a file if they fit, else on the fly.

    Args:
        upstream: what makes them, on its device.
        corpus: all utterances.
        memory_mib, disk_mib: limits.
        path: of the file, which the caller removes.
    """
    computed = ComputedFeatures(upstream, corpus)
    mib = 4 * math.prod(computed.shape) * int(computed.n_frames.sum()) / _MIB
    if mib > max(memory_mib, disk_mib):
        return computed
    file = None if mib <= memory_mib else path
    return StoredFeatures(computed, file, upstream.name, corpus.durations_samples)
