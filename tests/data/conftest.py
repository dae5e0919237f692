"""Small audio files, made where a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sf = pytest.importorskip("soundfile")


def noise(seconds: float, rate_hz: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Quiet noise below the band edge of 16 kHz, (S,) or (S, channels) float64."""
    rng = np.random.default_rng(seed)
    shape = (round(seconds * rate_hz),) if channels == 1 else (round(seconds * rate_hz), channels)
    return 0.1 * rng.standard_normal(shape)


@pytest.fixture
def write_audio(tmp_path: Path) -> Callable[..., Path]:
    """Write ``tmp_path / name``; the format follows from the suffix."""

    def write(name: str, seconds: float = 0.5, rate_hz: int = 16_000, **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        signal = options.pop("signal", None)
        if signal is None:
            channels, seed = options.pop("channels", 1), options.pop("seed", 0)
            signal = noise(seconds, rate_hz, channels, seed)
        kind = {"opus": ("OGG", "OPUS"), "ogg": ("OGG", "VORBIS")}.get(path.suffix[1:].lower())
        if kind:
            options.setdefault("format", kind[0])
            options.setdefault("subtype", kind[1])
        sf.write(path, signal, rate_hz, **options)
        return path

    return write


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Write lines (dicts, or raw text) to ``tmp_path / name``."""

    def write(lines: list[dict | str], name: str = "set.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def speech_like(write_audio: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of 24 short files of ragged lengths."""
    for i in range(24):
        write_audio(f"set/{i:02d}.wav", seconds=0.2 + 0.07 * ((7 * i) % 24), seed=i)
    return tmp_path / "set"
