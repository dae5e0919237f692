"""One audio file to 16 kHz mono float32: whole, or a window of it.

Anything wrong with a file is an `AudioError` whose reason starts with its kind (``missing``,
``empty``, ``not audio``, ``truncated``, ``not finite``, ``too loud``, ``unreadable``);
nothing is patched over.
"""

from __future__ import annotations

import math
import os
import stat
from typing import NamedTuple

import numpy as np

from gmm_jepa.data.containers import missing_data
from gmm_jepa.errors import InputError, require

SAMPLE_RATE_HZ = 16_000
LOUDEST = 2.0**31
"""Of floats as stored: integers of 32 bits that nobody scaled. Their squares stay finite."""

# soxr's "HQ" filters forget everything 256 output samples away (8 to 96 kHz, measured: windows
# differ from the whole by 6e-7 at most from there on); four times that for rates not measured.
_CONTEXT_SAMPLES = 1_024
_UNKNOWN_FRAMES = 1 << 40  # libsndfile reports 2^63 - 1 for a FLAC stream of unknown length
_BLOCK_FRAMES = 1 << 20
# Decoders that carry state from block to block start from the beginning: a seek into them is
# close, but not the same samples.
_SEQUENTIAL_FORMATS = ("OGG", "MP3", "MPEG")


class AudioError(InputError):
    """One file cannot be used.

    Attributes:
        path: the file.
        reason: one line, its kind first: ``"truncated: header promises 100 samples, ..."``.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self):
        return AudioError, (self.path, self.reason)


class AudioInfo(NamedTuple):
    """What a header says: `n_samples` at 16 kHz, and the file's own rate, channels and format."""

    n_samples: int
    rate_hz: int
    channels: int
    format: str


def probe_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """Read a file's header.

    Raises:
        AudioError: missing, empty, cut short, of zero length, or not audio.
    """
    with _open(path) as file:
        n_samples = _resampled_length(_n_frames(path, file), file.samplerate)
        return AudioInfo(n_samples, file.samplerate, file.channels, file.format)


def read_audio(
    path: str | os.PathLike[str], *, offset_s: float = 0.0, duration_s: float | None = None
) -> np.ndarray:
    """Decode a file, or `duration_s` seconds of it from `offset_s` on.

    Args:
        path: any file that libsndfile reads (WAV, FLAC, Ogg Vorbis or Opus, MP3, ...); any rate
            (resampled with soxr "HQ"), any number of channels (averaged).
        offset_s: where to begin, in seconds.
        duration_s: how much to read, in seconds; None reads to the end.

    Returns:
        (S,) float32 at 16 kHz. Integer formats span [-1, 1); float formats come as stored.

    Raises:
        AudioError: the file is unreadable, truncated, empty, holds NaN or infinity, is no audio,
            or ends before the seconds asked for.
        InputError: `offset_s` or `duration_s` is negative or not finite.
    """
    for name, value in (("offset_s", offset_s), ("duration_s", duration_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be finite and not negative, got {value}")
    start = round(offset_s * SAMPLE_RATE_HZ)
    n_samples = None if duration_s is None else round(duration_s * SAMPLE_RATE_HZ)
    return read_samples(path, start, n_samples)


def read_samples(
    path: str | os.PathLike[str],
    start_samples: int = 0,
    n_samples: int | None = None,
    *,
    promised_samples: int | None = None,
    tolerance_samples: int = 0,
) -> np.ndarray:
    """Decode a window given in samples at 16 kHz; exactly `n_samples` come back.

    Windows of a file equal the same cut of the whole: exactly where the file is at 16 kHz, to
    float32 rounding where it is resampled. WAV and FLAC seek; Ogg and MP3 decode from the start.
    An MP3 with a variable bit rate and no Xing header is read for as long as libsndfile believes.

    Args:
        path: the file.
        start_samples: first sample.
        n_samples: how many; None reads to the end.
        promised_samples: where someone else (a manifest) says the wanted part of the file ends.
        tolerance_samples: how far that, or the window, may reach past the end of the file for
            the sake of rounded durations; the window's missing samples are zeros.

    Returns:
        (n_samples,) float32.

    Raises:
        AudioError: see `read_audio`.
    """
    with _open(path) as file:
        rate_hz, frames = file.samplerate, _n_frames(path, file)
        total = _resampled_length(frames, rate_hz)
        stop = total if n_samples is None else start_samples + n_samples
        furthest = max(stop, promised_samples or 0)
        if furthest > total + tolerance_samples or start_samples > stop:
            raise AudioError(
                path,
                f"truncated: {max(furthest, start_samples)} samples expected, "
                f"the file holds {total} (at 16 kHz)",
            )
        held = min(stop, total)
        if start_samples >= held:
            window = np.zeros(0, np.float32)
        elif rate_hz == SAMPLE_RATE_HZ:
            window = _read_frames(path, file, start_samples, held)
        else:
            window = _read_resampled(path, file, frames, start_samples, held)
    if len(window) == stop - start_samples:
        return window
    return np.concatenate([window, np.zeros(stop - start_samples - len(window), np.float32)])


def _open(path: str | os.PathLike[str]):
    """A `soundfile.SoundFile`, after the checks that libsndfile does not make."""
    soundfile = require("soundfile", extra="train")
    name = os.fspath(path)
    try:
        status = os.stat(os.fsencode(name))
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(name, "not audio: not a regular file")
        if status.st_size == 0:
            raise AudioError(name, "empty: the file has 0 bytes")
        missing = missing_data(name, status.st_size)
        if missing:
            raise AudioError(name, f"truncated: {missing}")
        return soundfile.SoundFile(os.fsencode(name))
    except FileNotFoundError:
        raise AudioError(name, "missing: no such file") from None
    except OSError as error:
        raise AudioError(name, f"unreadable: {error.strerror or error}") from None
    except AudioError:
        raise
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise AudioError(name, f"not audio: {_describe(error)}") from None


def _n_frames(path: str | os.PathLike[str], file) -> int:
    frames = file.frames
    if frames >= _UNKNOWN_FRAMES:
        # soundfile seeks after each read where it may, which fails at an end it does not know.
        file.seekable = lambda: False
        frames = _count_frames(path)
    if _resampled_length(frames, file.samplerate) == 0:
        raise AudioError(path, "empty: zero samples of audio")
    return frames


def _count_frames(path: str | os.PathLike[str]) -> int:
    """Decode a stream of unknown length to learn it."""
    with _open(path) as file:
        file.seekable = lambda: False
        return _skip(path, file, _UNKNOWN_FRAMES)


def _resampled_length(frames: int, rate_hz: int) -> int:
    return (frames * SAMPLE_RATE_HZ + rate_hz // 2) // rate_hz


def _read_frames(path: str | os.PathLike[str], file, start: int, stop: int) -> np.ndarray:
    """Frames [start, stop) at the file's own rate, mono."""
    if file.format in _SEQUENTIAL_FORMATS or not file.seekable():
        file.seekable = lambda: False  # soundfile seeks after each read, which is another place
        decoded = _skip(path, file, start)
    else:
        decoded = start
        try:
            file.seek(start)
        except RuntimeError as error:  # libsndfile's errors are RuntimeErrors
            raise AudioError(path, f"unreadable: seek failed, {_describe(error)}") from None
    mono = _decode_mono(path, file, stop - start)
    decoded += len(mono)
    if decoded < stop:
        raise AudioError(
            path,
            f"truncated: {stop} samples promised, {decoded} decoded (at {file.samplerate} Hz)",
        )
    if mono.size and not -LOUDEST <= mono.min() <= mono.max() <= LOUDEST:  # nor NaN
        finite = np.isfinite(mono)
        first = start + int(np.argmin(finite & (np.abs(mono) <= LOUDEST)))
        where = f"at sample {first} (at {file.samplerate} Hz)"
        if finite.all():
            raise AudioError(path, f"too loud: {mono[first - start]:.3g} {where}, past 2^31")
        raise AudioError(path, f"not finite: NaN or infinity {where}")
    return mono


def _decode_mono(path: str | os.PathLike[str], file, n_frames: int) -> np.ndarray:
    """The next frames, fewer at the end; of all channels a block at a time is held."""
    mono = np.empty(n_frames, np.float32)
    decoded = 0
    while decoded < n_frames:
        wanted = min(_BLOCK_FRAMES, n_frames - decoded)
        block = _decode(path, file, wanted)
        with np.errstate(invalid="ignore", over="ignore"):  # looked for when all are here
            mean = block.mean(axis=1, dtype=np.float32) if block.ndim == 2 else block
        mono[decoded : decoded + len(block)] = mean
        decoded += len(block)
        if len(block) < wanted:
            break
    return mono[:decoded]


def _skip(path: str | os.PathLike[str], file, n_frames: int) -> int:
    """Decode frames and forget them, a block at a time; how many there were, at most `n_frames`."""
    skipped = 0
    while skipped < n_frames:
        block = min(_BLOCK_FRAMES, n_frames - skipped)
        skipped += (n := len(_decode(path, file, block)))
        if n < block:
            break
    return skipped


def _read_resampled(
    path: str | os.PathLike[str], file, frames: int, start: int, stop: int
) -> np.ndarray:
    """Samples [start, stop) at 16 kHz, from source frames that begin on a common grid point."""
    soxr = require("soxr", extra="train")
    divisor = math.gcd(SAMPLE_RATE_HZ, file.samplerate)
    out_step, in_step = SAMPLE_RATE_HZ // divisor, file.samplerate // divisor
    first = max(0, (start - _CONTEXT_SAMPLES) // out_step)
    last = -(-(stop + _CONTEXT_SAMPLES) // out_step)
    source = _read_frames(path, file, first * in_step, min(frames, last * in_step))
    resampled = soxr.resample(source, file.samplerate, SAMPLE_RATE_HZ, quality="HQ")
    window = resampled[start - first * out_step : stop - first * out_step]
    if len(window) < stop - start:  # soxr may end one sample before the rounded length
        window = np.pad(window, (0, stop - start - len(window)), mode="edge")
    return np.ascontiguousarray(window)


def _decode(path: str | os.PathLike[str], file, n_frames: int) -> np.ndarray:
    try:
        return file.read(n_frames, dtype="float32")
    except RuntimeError as error:
        raise AudioError(path, f"truncated: decoding failed, {_describe(error)}") from None


def _describe(error: Exception) -> str:
    """libsndfile's own words, on one line."""
    words = getattr(error, "error_string", None) or str(error)
    return " ".join(words.split()) or type(error).__name__
