"""What every corpus can do, and the two ways to make one of others: a part, and a union."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.rejects import Reject


class Corpus(ABC):
    """Utterances by number: 16 kHz mono audio, its length, and what is written about it.

    No Python object per utterance is held: lists are arrays, or bytes on disk that are mapped,
    so that forked workers share them. A corpus can be pickled (workers that are spawned).
    """

    durations_samples: np.ndarray
    """(N,) int64, samples at 16 kHz."""

    def __len__(self) -> int:
        return len(self.durations_samples)

    @property
    def total_s(self) -> float:
        """Seconds of audio in all, each utterance once."""
        return float(self.durations_samples.sum()) / SAMPLE_RATE_HZ

    @property
    def weights(self) -> np.ndarray:
        """(N,) float64: how often an utterance is to occur per epoch."""
        return np.broadcast_to(np.float64(1.0), len(self))

    @property
    def is_decoded(self) -> np.ndarray:
        """(N,) bool: whose audio was decoded and found good when the corpus was made."""
        return np.broadcast_to(False, len(self))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal hash of what is listed, wherever it lies; equal lists have equal ones."""

    def read(self, i: int, start_samples: int = 0, n_samples: int | None = None) -> np.ndarray:
        """Decode utterance `i`, or `n_samples` of it from `start_samples` on.

        Returns:
            (n_samples,) float32 at 16 kHz; None reads to the utterance's end.

        Raises:
            AudioError: the audio cannot be used.
            IndexError: there is no such utterance, or the window is not inside it.
        """
        i, start, n = self._window(i, start_samples, n_samples)
        return self._read(i, start, n)

    def read_into(self, i: int, start_samples: int, out: np.ndarray) -> None:
        """As `read`, into (n_samples,) float32 memory, which holds anything after an error."""
        i, start, _ = self._window(i, start_samples, len(out))
        self._read_into(i, start, out)

    @abstractmethod
    def entry(self, i: int) -> dict:
        """What is known of utterance `i`: `id`, `duration` (seconds), and the manifest's keys."""

    @abstractmethod
    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """Where utterance `i` comes from: audio file, line from 1 of its manifest, manifest."""

    @abstractmethod
    def _read(self, i: int, start: int, n: int) -> np.ndarray: ...

    def _read_into(self, i: int, start: int, out: np.ndarray) -> None:
        out[:] = self._read(i, start, len(out))

    def reject(self, i: int, error: AudioError) -> Reject:
        """The record of an utterance that could not be read."""
        file, line, manifest = self.locate(i)
        return Reject(file, line, error.reason, manifest)

    def select(self, indices: Sequence[int] | np.ndarray) -> Corpus:
        """A view of some utterances, in the order given (a boolean mask keeps the order)."""
        return SelectedCorpus(self, np.asarray(indices))

    def _window(self, i: int, start: int, n: int | None) -> tuple[int, int, int]:
        i = self._checked(i)
        duration = int(self.durations_samples[i])
        stop = duration if n is None else start + n
        if not 0 <= start <= stop <= duration:
            raise IndexError(f"samples {start}..{stop} are not inside utterance {i} of {duration}")
        return i, int(start), int(stop - start)

    def _checked(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"utterance {i} of {len(self)}")
        return int(i)


class SelectedCorpus(Corpus):
    """Some utterances of another corpus."""

    def __init__(self, parent: Corpus, indices: np.ndarray):
        if indices.dtype == bool:
            if indices.shape != (len(parent),):
                raise IndexError(f"a mask of {len(parent)} is needed, got {indices.shape}")
            indices = np.flatnonzero(indices)
        indices = indices.astype(np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(parent)):
            raise IndexError(f"indices must be in 0..{len(parent) - 1}")
        self._parent, self._indices = parent, indices
        self.durations_samples = parent.durations_samples[indices]

    @property
    def weights(self) -> np.ndarray:
        """(N,) float64, the parent's."""
        return self._parent.weights[self._indices]

    @property
    def is_decoded(self) -> np.ndarray:
        """(N,) bool, the parent's."""
        return self._parent.is_decoded[self._indices]

    @cached_property
    def fingerprint(self) -> str:
        """Of the parent's and the choice."""
        return hash_parts("selected", self._parent.fingerprint, self._indices.tobytes())

    def entry(self, i: int) -> dict:
        """The parent's."""
        return self._parent.entry(self._indices[self._checked(i)])

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """The parent's."""
        return self._parent.locate(self._indices[self._checked(i)])

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        return self._parent.read(self._indices[i], start, n)

    def _read_into(self, i: int, start: int, out: np.ndarray) -> None:
        self._parent.read_into(self._indices[i], start, out)


class JoinedCorpus(Corpus):
    """Several corpora one after another, each with a weight."""

    def __init__(self, members: Sequence[Corpus], weights: Sequence[float]):
        assert len(members) == len(weights)
        self._members, self._member_weights = list(members), list(weights)
        self._ends = np.cumsum([len(member) for member in members])
        self.durations_samples = np.concatenate([m.durations_samples for m in members])

    @property
    def weights(self) -> np.ndarray:
        """(N,) float64: a member's own weights times the weight it was joined with."""
        return np.concatenate([m.weights * w for m, w in zip(self._members, self._member_weights)])

    @property
    def is_decoded(self) -> np.ndarray:
        """(N,) bool, the members'."""
        return np.concatenate([member.is_decoded for member in self._members])

    @cached_property
    def fingerprint(self) -> str:
        """Of the members', in order."""
        return hash_parts("joined", *(member.fingerprint for member in self._members))

    def entry(self, i: int) -> dict:
        """The member's."""
        member, j = self._find(self._checked(i))
        return member.entry(j)

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """The member's."""
        member, j = self._find(self._checked(i))
        return member.locate(j)

    def _find(self, i: int) -> tuple[Corpus, int]:
        m = int(np.searchsorted(self._ends, i, side="right"))
        return self._members[m], i - (int(self._ends[m - 1]) if m else 0)

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        member, j = self._find(i)
        return member.read(j, start, n)

    def _read_into(self, i: int, start: int, out: np.ndarray) -> None:
        member, j = self._find(i)
        member.read_into(j, start, out)


def hash_parts(*parts: str | bytes) -> str:
    """Hexadecimal SHA-256 of several parts, each with its length, so that none runs over."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
