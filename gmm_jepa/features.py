"""The log-mel front end: what a frame is, how many there are, and the frames themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError

_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)

Array = TypeVar("Array", Tensor, np.ndarray)
Count = TypeVar("Count", int, Tensor, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class LogMelSpec:
    """A log-mel front end: periodic Hann window, centred frames, power, HTK mel filters, log.

    Equal to ``torchaudio.transforms.MelSpectrogram(sample_rate_hz, n_fft, hop_length=hop_samples,
    n_mels=n_mels, f_min=f_min_hz, f_max=f_max_hz)`` followed by ``log(mel + floor)``.

    Raises:
        InputError: a value makes no sense, or a mel filter holds no frequency bin.
    """

    sample_rate_hz: int = 16_000
    n_fft: int = 400
    """window and transform, samples; even"""
    hop_samples: int = 320
    """samples between frames"""
    n_mels: int = 80
    f_min_hz: float = 0.0
    f_max_hz: float = 8_000.0
    floor: float = 1e-6
    """added to the mel energies before the logarithm"""

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "n_fft", "hop_samples", "n_mels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected a whole number above 0, got {value!r}")
        for name in ("f_min_hz", "f_max_hz", "floor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{name}: expected a number, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.n_fft % 2:
            raise InputError(f"n_fft: expected an even number, got {self.n_fft}")
        if not 0.0 <= self.f_min_hz < self.f_max_hz <= self.sample_rate_hz / 2:
            raise InputError(
                "f_min_hz, f_max_hz: expected 0 <= f_min_hz < f_max_hz <= "
                f"{self.sample_rate_hz / 2:g}, got {self.f_min_hz:g} and {self.f_max_hz:g}"
            )
        if not (self.floor > 0.0 and math.isfinite(self.floor)):
            raise InputError(f"floor: expected a finite number above 0, got {self.floor}")
        with torch.inference_mode(False):  # they outlive the mode, and autograd keeps them
            object.__setattr__(self, "_filters", _make_filters(self))
            window = torch.hann_window(self.n_fft, dtype=torch.float32, device="cpu")
            object.__setattr__(self, "_window", window)
        object.__setattr__(self, "_copies", {})
        empty = (self._filters.amax(0) == 0).nonzero().flatten().tolist()
        if empty:
            raise InputError(
                f"n_mels: mel filter {empty[0]} of {self.n_mels} holds none of the "
                f"{self.n_fft // 2 + 1} frequency bins ({len(empty)} empty in all); "
                "use fewer mels or a larger n_fft"
            )

    def filters(self, device: torch.device | str = "cpu") -> Tensor:
        """Mel filters (n_fft // 2 + 1, n_mels) float32, HTK scale, no norm. Shared: read only."""
        return self._on(device)[0]

    def window(self, device: torch.device | str = "cpu") -> Tensor:
        """Periodic Hann window (n_fft,) float32. Shared: read only."""
        return self._on(device)[1]

    def _on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Filters and window on a device, copied there once."""
        key = str(device)
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = (self._filters.to(device), self._window.to(device))
        return self._copies[key]

    def to_dict(self) -> dict[str, int | float]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogMelSpec:
        """The inverse of `to_dict`.

        Raises:
            InputError: a key is unknown, or a value makes no sense.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"front end: unknown key {sorted(unknown)[0]!r}")
        return cls(**values)

    def describe(self) -> str:
        """One line that names every value."""
        return (
            f"log-mel {self.sample_rate_hz} Hz, n_fft {self.n_fft}, hop {self.hop_samples}, "
            f"{self.n_mels} HTK mels {self.f_min_hz:g}-{self.f_max_hz:g} Hz, floor {self.floor:g}"
        )


def _make_filters(spec: LogMelSpec) -> Tensor:
    """Triangles in the arithmetic of `torchaudio.functional.melscale_fbanks`, bit for bit."""
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults
    bins_hz = torch.linspace(0, spec.sample_rate_hz // 2, spec.n_fft // 2 + 1, **plain)
    lowest, highest = _mel(spec.f_min_hz), _mel(spec.f_max_hz)
    edges_mel = torch.linspace(lowest, highest, spec.n_mels + 2, **plain)
    edges_hz = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    widths_hz = edges_hz.diff()
    slopes = edges_hz[None] - bins_hz[:, None]
    falling = -slopes[:, :-2] / widths_hz[:-1]
    rising = slopes[:, 2:] / widths_hz[1:]
    return torch.minimum(falling, rising).clamp_min(0.0)


def _mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def log_mel_frames(n_samples: Count, spec: LogMelSpec) -> Count:
    """Number of log-mel frames of a signal: ``n_samples // hop + 1``, or 0 of an empty one.

    Takes and returns an int, an integer tensor or an integer array.
    """
    return (n_samples // spec.hop_samples + 1) * (n_samples > 0)


_DEFAULT = LogMelSpec()


def log_mel(
    waveform: Array,
    lengths_samples: Array | None = None,
    *,
    spec: LogMelSpec = _DEFAULT,
    shift_samples: int = 0,
) -> Array:
    """Log-mel frames of one waveform or of a padded batch; NumPy in, NumPy out.

    Args:
        waveform: (S,) or (B, S) at `spec.sample_rate_hz`, float in [-1, 1] or int16; a torch
            tensor on any device or a NumPy array.
        lengths_samples: (B,) true lengths of the rows, if not all are S; only with a batch.
        spec: the front end.
        shift_samples: leading samples to drop, so that frame t is centred on sample
            ``hop * t + shift_samples`` of what was given.

    Returns:
        (T, n_mels) or (B, T, n_mels) float32 with ``T = log_mel_frames(S - shift_samples)``.
        Frames behind a row's own end are 0. Differentiable in a floating-point tensor.

    Raises:
        InputError: shapes or lengths make no sense.
        TypeError: the waveform is of an unknown type.
    """
    from_numpy = isinstance(waveform, np.ndarray)
    signal = tensor_of(waveform) if from_numpy else waveform
    if not isinstance(signal, Tensor):
        raise TypeError(f"waveform: expected a tensor or an array, got {type(waveform).__name__}")
    if signal.ndim not in (1, 2):
        raise InputError(f"waveform: expected (S,) or (B, S), got {tuple(signal.shape)}")
    refuse_channels_last(signal)
    if signal.dtype == torch.float64:
        signal = signal.float()
    rows = signal if signal.ndim == 2 else signal[None]
    if shift_samples < 0:
        raise InputError(f"shift_samples: expected 0 or more, got {shift_samples}")
    lengths = _lengths(rows, lengths_samples, batched=signal.ndim == 2)
    rows = rows[:, min(shift_samples, rows.shape[1]) :]
    lengths = (lengths - shift_samples).clamp(0, rows.shape[1])
    device = rows.device
    frames = ops.log_mel(
        rows.contiguous(),
        lengths,
        spec.window(device),
        spec.filters(device),
        hop=spec.hop_samples,
        floor=spec.floor,
    )
    frames = frames[:, : log_mel_frames(rows.shape[1], spec)]
    frames = frames if signal.ndim == 2 else frames[0]
    return frames.numpy() if from_numpy else frames


def refuse_channels_last(waveform: Tensor) -> None:
    """Raise InputError for what can only be (samples, channels), as many readers of files give."""
    if waveform.ndim == 2 and waveform.shape[1] <= 8 and waveform.shape[0] >= 400:
        raise InputError(
            f"waveform: expected (S,) or (B, S), got {tuple(waveform.shape)}, which looks like "
            "samples by channels: take one of them, or their mean"
        )


def tensor_of(array: np.ndarray) -> Tensor:
    """A copy of an array in either byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _lengths(rows: Tensor, lengths_samples: Tensor | np.ndarray | None, *, batched: bool) -> Tensor:
    """Checked lengths (B,) int64 on the device of `rows`; values are checked on the CPU only."""
    B, S = rows.shape
    if lengths_samples is None:
        return torch.full((B,), S, dtype=torch.int64, device=rows.device)
    if not batched:
        raise InputError("lengths_samples: only with a batch (B, S), got one waveform (S,)")
    of_numpy = isinstance(lengths_samples, np.ndarray)
    lengths = tensor_of(lengths_samples) if of_numpy else torch.as_tensor(lengths_samples)
    if lengths.shape != (B,) or lengths.dtype not in _INTEGERS:
        raise InputError(
            f"lengths_samples: expected ({B},) whole numbers, "
            f"got {lengths.dtype} {tuple(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((lengths < 0) | (lengths > S)).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"lengths_samples[{wrong[0]}]: expected 0 to {S}, got {int(lengths[wrong[0]])}"
            )
    return lengths.to(rows.device)
