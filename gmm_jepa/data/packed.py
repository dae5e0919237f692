"""Packed corpora: decoded once, kept as int16 in memory-mapped shards.

A pack is a folder of ``shard_*.npy`` (int16, 16 kHz mono, utterances end to end), ``index.npy``
((N, 4) int64: shard, first sample, samples, position in ``entries.jsonl``), ``entries.jsonl``
(what the manifests said of each), ``rejects.jsonl`` and, written last, ``pack.json`` with a
SHA-256 of every file. Until then the folder ``partial`` tells which shards are done.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from gmm_jepa.data.base import Corpus
from gmm_jepa.errors import InputError

FORMAT = "gmm-jepa-pack"
VERSION = 1
FULL_SCALE = 32_768

SUMMARY, INDEX, ENTRIES, REJECTS = "pack.json", "index.npy", "entries.jsonl", "rejects.jsonl"
PARTIAL = "partial"
PLAN = "plan.json"

MOST_OPEN_SHARDS = 1_024
"""Shards that a process keeps mapped at most, of all packs. A mapping holds a file descriptor: of
these, too, no more than a quarter of what the process may have."""


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack, finished or not."""
    return (folder / SUMMARY).is_file() or (folder / PARTIAL / PLAN).is_file()


class PackedCorpus(Corpus):
    """A pack, open for reading.

    Args:
        folder: what `pack_corpus` wrote.

    Raises:
        InputError: the pack is unfinished, of another version, or a file of it is missing or cut.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).absolute()
        if not (self.folder / SUMMARY).is_file():
            if (self.folder / PARTIAL / PLAN).is_file():
                raise InputError(
                    f"{folder} is an unfinished pack: run the same `gmm-jepa pack` again, it "
                    "takes up where it stopped"
                )
            raise InputError(f"{folder} is no pack: it has no {SUMMARY}")
        self.summary = json.loads((self.folder / SUMMARY).read_text())
        found = (self.summary.get("format"), self.summary.get("version"))
        if found != (FORMAT, VERSION):
            raise InputError(f"{folder}: {FORMAT} version {VERSION} is expected, got {found}")
        for file in self.summary["files"]:
            path = self.folder / file["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                raise InputError(f"{path}: {file['bytes']} bytes are expected, found {size}")
        self._index = _mapped(self.folder / INDEX)
        self.durations_samples = np.array(self._index[:, 2])

    @property
    def is_decoded(self) -> np.ndarray:
        """(N,) bool, all: `verify` tells whether the files have changed since."""
        return np.broadcast_to(True, len(self))

    @property
    def fingerprint(self) -> str:
        """Of the audio and of where each utterance lies in it."""
        return self.summary["fingerprint"]

    @property
    def n_clipped_samples(self) -> int:
        """Samples that lay outside [-1, 1] and were clipped when the pack was made."""
        return self.summary["n_clipped_samples"]

    def entry(self, i: int) -> dict:
        """What the source's `entry` gave when the pack was made."""
        start = int(self._index[self._checked(i), 3])
        return json.loads(self._entries[start : self._entries.find(b"\n", start)])

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """The shard (utterances have no file of their own), and the entry's line."""
        shard = int(self._index[self._checked(i), 0])
        return str(self.folder / shard_name(shard)), i + 1, str(self.folder / ENTRIES)

    def verify(self) -> None:
        """Read every file of the pack and compare its SHA-256.

        Raises:
            InputError: files differ; the message names them.
        """
        files = self.summary["files"]
        bad = [f["name"] for f in files if sha256(self.folder / f["name"]) != f["sha256"]]
        if bad:
            raise InputError(f"{self.folder}: contents changed since packing: {', '.join(bad)}")

    def __reduce__(self):
        return PackedCorpus, (self.folder,)

    @cached_property
    def _entries(self) -> mmap.mmap:
        with open(self.folder / ENTRIES, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        out = np.empty(n, np.float32)
        self._read_into(i, start, out)
        return out

    def _read_into(self, i: int, start: int, out: np.ndarray) -> None:
        number, first, _, _ = self._index[i].tolist()
        first += start
        window = _mapped_shard(self.folder, self.fingerprint, number)[first : first + len(out)]
        np.multiply(window, np.float32(1 / FULL_SCALE), out=out, dtype=np.float32)


def _most_open_shards() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return MOST_OPEN_SHARDS // 4
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(soft // 4, 1)
    return min(limit, MOST_OPEN_SHARDS)


def _mapped(path: Path) -> np.ndarray:
    """What a file holds, without the class `np.memmap`, whose slices are dear."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


# Safe to share among threads, and no lock that a fork could leave locked.
@lru_cache(_most_open_shards())
def _mapped_shard(folder: Path, _fingerprint: str, number: int) -> np.ndarray:
    return _mapped(folder / shard_name(number))


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard_{number:05d}.npy"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def to_int16(waveform: np.ndarray) -> tuple[np.ndarray, int]:
    """Round float samples to int16.

    Returns:
        (S,) int16, and how many samples lay outside [-1, 1] and were clipped. 1.0 itself becomes
        32767, the largest there is.
    """
    n_clipped = int(np.count_nonzero(np.abs(waveform) > 1.0))
    scaled = np.rint(waveform * np.float32(FULL_SCALE))
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16), n_clipped
