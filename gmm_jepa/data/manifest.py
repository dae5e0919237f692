"""JSONL manifests: one JSON object per utterance, left on disk and mapped."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError, read_samples
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.files import probe_all
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.errors import InputError
from gmm_jepa.files import readable

PATH_KEYS = ("audio_filepath", "wav_path", "audio_path", "path")

# Manifests round durations, often to milliseconds; past one 20 ms hop it is no rounding.
_TOLERANCE_SAMPLES = 320
_CHUNK_LINES = 8_192
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


_HALVES = (b"\\ud", b"\\uD", b"\xed")
"""What halves of characters begin with, escaped or raw."""


class BadLineError(ValueError):
    """A line that is no utterance; the message is the reason."""


class Line(NamedTuple):
    """An utterance as a manifest gives it; `duration_samples` None: ask the audio's header."""

    fields: dict
    path: str
    offset_samples: int
    duration_samples: int | None


def parse_line(line: bytes) -> Line:
    """Read one line of a manifest.

    Raises:
        BadLineError: it is not a JSON object with a path and sensible times.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"bad JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadLineError(f"bad JSON: an object is expected, got {type(fields).__name__}")
    key = next((key for key in PATH_KEYS if key in fields), None)
    if key is None:
        raise BadLineError(f"no path: none of the keys {', '.join(PATH_KEYS)}")
    path = fields[key]
    if not isinstance(path, str) or not path:
        raise BadLineError(f"no path: {key} is {path!r}")
    if any(half in line for half in _HALVES):
        fields = _readable(fields)
    offset = _samples(fields, "offset") or 0
    duration = _samples(fields, "duration")
    if duration == 0:
        raise BadLineError("empty: duration is zero")
    return Line(fields, path, offset, duration)


def _readable(value: Any) -> Any:
    """JSON values whose texts are `readable`: escapes may stand for half a character."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, dict):
        return {readable(name): _readable(item) for name, item in value.items()}
    return value


def _samples(fields: dict, key: str) -> int | None:
    seconds = fields.get(key)
    if seconds is None:
        return None
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < math.inf:
        raise BadLineError(f"bad {key}: seconds are expected, got {seconds!r}")
    samples = round(seconds * SAMPLE_RATE_HZ)
    if samples >= 1 << 48:
        raise BadLineError(f"bad {key}: {seconds!r} s")
    return samples


class ManifestCorpus(Corpus):
    """Utterances listed in a JSONL manifest.

    The file stays on disk, mapped; in memory are each utterance's place in it and its length.
    A `duration` is believed here and checked when the audio is read; where there is none, the
    audio's header is read now. Relative paths resolve against the manifest's folder.

    Args:
        path: the manifest.
        rejects: takes bad lines, and files whose headers cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], rejects: RejectLog):
        self._path = os.path.abspath(path)
        self._folder = os.path.dirname(self._path)
        self._size_bytes = os.path.getsize(self._path)
        self._map: mmap.mmap | None = None
        starts, numbers, durations = array("q"), array("q"), array("q")
        digest = hashlib.sha256(b"manifest")
        for number, start, text, duration in self._scan(rejects):
            starts.append(start)
            numbers.append(number)
            durations.append(duration)
            digest.update(text.strip() + b"\0%d\0" % duration)
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)
        self.durations_samples = np.array(durations, np.int64)
        self._fingerprint = digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of the usable lines and their lengths."""
        return self._fingerprint

    def entry(self, i: int) -> dict:
        """The line's keys; `audio_filepath` resolved, `duration` as used, `id` where it had none.

        The `id` made here is the path as written, without its suffix, and ``@offset`` if any.
        """
        line = self._line(self._checked(i))
        at = f"@{line.fields['offset']}" if line.offset_samples else ""
        made = {"id": readable(os.path.splitext(PurePath(line.path).as_posix())[0] + at)}
        used = {
            "audio_filepath": self._resolve(line.path),
            "duration": int(self.durations_samples[i]) / SAMPLE_RATE_HZ,
        }
        return {**made, **line.fields, **used}

    def locate(self, i: int) -> tuple[str, int | None, str | None]:
        """The audio file, the line's number, the manifest."""
        line = self._line(self._checked(i))
        return self._resolve(line.path), int(self._numbers[i]), self._path

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def _read(self, i: int, start: int, n: int) -> np.ndarray:
        line = self._line(i)
        return read_samples(
            self._resolve(line.path),
            line.offset_samples + start,
            n,
            promised_samples=line.offset_samples + int(self.durations_samples[i]),
            tolerance_samples=_TOLERANCE_SAMPLES,
        )

    def _line(self, i: int) -> Line:
        if self._map is None:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self._size_bytes:
                    raise InputError(f"{self._path} has changed since it was opened")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self._starts[i])
        end = self._map.find(b"\n", start)
        return parse_line(self._map[start : end if end >= 0 else len(self._map)])

    def _resolve(self, path: str) -> str:
        return os.path.normpath(os.path.join(self._folder, path))

    def _scan(self, rejects: RejectLog) -> Iterator[tuple[int, int, bytes, int]]:
        """Line number, position, text and length in samples of each usable line."""
        with open(self._path, "rb") as file:
            lines = self._parse(file, rejects)
            while chunk := list(islice(lines, _CHUNK_LINES)):
                lengths = self._lengths(chunk)
                for (number, start, text, line), (length, reason) in zip(chunk, lengths):
                    if reason is None:
                        yield number, start, text, length
                    else:
                        file_path = self._resolve(line.path)
                        rejects.add(Reject(file_path, number, reason, self._path))

    def _parse(self, file, rejects: RejectLog) -> Iterator[tuple[int, int, bytes, Line]]:
        end = 0
        for number, text in enumerate(file, start=1):
            start, end = end, end + len(text)
            if number == 1 and text.startswith(_BYTE_ORDER_MARK):
                start, text = start + len(_BYTE_ORDER_MARK), text[len(_BYTE_ORDER_MARK) :]
            if not text.strip():
                continue
            try:
                yield number, start, text, parse_line(text)
            except BadLineError as error:
                rejects.add(Reject(self._path, number, str(error)))

    def _lengths(self, chunk: list[tuple[int, int, bytes, Line]]) -> list[tuple[int, str | None]]:
        """Per line: samples, and why it cannot be used (None: it can)."""
        unknown = [line.path for *_, line in chunk if line.duration_samples is None]
        probed = probe_all(unknown, self._resolve)
        lengths: list[tuple[int, str | None]] = []
        for *_, line in chunk:
            if line.duration_samples is not None:
                lengths.append((line.duration_samples, None))
                continue
            _, info = next(probed)
            if isinstance(info, AudioError):
                lengths.append((0, info.reason))
            elif info.n_samples <= line.offset_samples:
                reason = f"empty: offset {line.fields['offset']} s is at or past the file's end"
                lengths.append((0, reason))
            else:
                lengths.append((info.n_samples - line.offset_samples, None))
        return lengths


def is_manifest(path: Path) -> bool:
    """Whether a file is taken for a manifest (by its suffix)."""
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")
