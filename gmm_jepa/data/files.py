"""Audio files found in a folder, or given one by one."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError, AudioInfo, probe_audio, read_samples
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.rejects import Reject, RejectLog

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")

_PROBE_THREADS = 8  # headers wait for the disk, above all on a network
_PROBE_CHUNK = 1_024


class FileCorpus(Corpus):
    """Audio files under one root, one utterance each.

    Names are kept as one buffer of bytes with offsets.

    Args:
        root: folder that `names` are relative to.
        names: relative paths, in order.
        rejects: takes the files whose headers cannot be used.
    """

    def __init__(self, root: str | os.PathLike[str], names: Iterable[str], rejects: RejectLog):
        self._root = os.path.abspath(root)
        buffer, ends, durations = bytearray(), array("q", [0]), array("q")
        digest = hashlib.sha256(b"files")
        for name, info in probe_all(names, self._path):
            if isinstance(info, AudioError):
                rejects.add(Reject(info.path, None, info.reason))
                continue
            buffer += os.fsencode(name)
            ends.append(len(buffer))
            durations.append(info.n_samples)
            digest.update(os.fsencode(name) + b"\0%d\0" % info.n_samples)
        self._names, self._ends = np.frombuffer(bytes(buffer), np.uint8), np.array(ends, np.int64)
        self.durations_samples = np.array(durations, np.int64)
        self._fingerprint = digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of relative names and lengths."""
        return self._fingerprint

    def entry(self, i: int) -> dict:
        """`id` (the relative path without its suffix), `audio_filepath` and `duration`."""
        name = self._name(self._checked(i))
        return {
            "id": str(PurePosixPath(name).with_suffix("")),
            "audio_filepath": self._path(name),
            "duration": int(self.durations_samples[i]) / SAMPLE_RATE_HZ,
        }

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """The file; there is no manifest."""
        return self._path(self._name(self._checked(i))), None, None

    def _name(self, i: int) -> str:
        return os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]].tobytes())

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        path, promised = self._path(self._name(i)), int(self.durations_samples[i])
        return read_samples(path, start, n, promised_samples=promised)


def find_audio(folder: str | os.PathLike[str], rejects: RejectLog) -> Iterator[str]:
    """Relative paths of the audio files under a folder, in the order of their path's parts.

    Links are followed, but never back into a folder they lie in. Folders that cannot be listed
    go to `rejects`.
    """
    root = Path(folder)

    def walk(relative: str, above: tuple[str, ...]) -> Iterator[str]:
        here = root / relative
        real = os.path.realpath(here)
        if real in above:
            return
        try:
            found = sorted(os.scandir(here), key=lambda item: item.name)
        except OSError as error:
            rejects.add(Reject(str(here), None, f"unreadable: {error.strerror or error}"))
            return
        for item in found:
            name = os.path.join(relative, item.name)
            if item.is_dir():
                yield from walk(name, (*above, real))
            elif item.name.lower().endswith(AUDIO_SUFFIXES):
                yield name

    return walk("", ())


def probe_all(names: Iterable[str], locate) -> Iterator[tuple[str, AudioInfo | AudioError]]:
    """Read many headers, in order: pairs of a name and what its file says, or why it cannot.

    Args:
        names: any number of names; a chunk of them is held at a time.
        locate: gives the path of a name.
    """

    def probe(name: str) -> AudioInfo | AudioError:
        try:
            return probe_audio(locate(name))
        except AudioError as error:
            return error

    remaining = iter(names)
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        while chunk := list(islice(remaining, _PROBE_CHUNK)):
            yield from zip(chunk, pool.map(probe, chunk))
