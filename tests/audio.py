"""Small synthetic speech-like audio for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def babble(n_samples: int, seed: int) -> np.ndarray:
    """(n_samples,) float32 at 16 kHz: a few harmonic sounds and hisses after one another."""
    rng = np.random.default_rng(seed)
    sounds = []
    while sum(map(len, sounds)) < n_samples:
        n = int(rng.integers(1600, 4800))
        t = np.arange(n) / 16_000
        if rng.uniform() < 0.3:
            sound = rng.standard_normal(n) * 0.3
        else:
            pitch = rng.choice([110.0, 140.0, 200.0])
            formant = rng.choice([500.0, 900.0, 1500.0, 2300.0])
            sound = sum(
                np.sin(2 * np.pi * pitch * h * t) * np.exp(-(((pitch * h - formant) / 300) ** 2))
                for h in range(1, 20)
            )
        sounds.append(0.2 * sound * np.hanning(n) ** 0.3)
    noise = 0.001 * rng.standard_normal(n_samples)
    return (np.concatenate(sounds)[:n_samples] + noise).astype(np.float32)


def write_corpus(folder: Path, n: int = 24, *, seconds: tuple[float, float] = (0.6, 2.4)) -> Path:
    """Write `n` flac files by four speakers and a manifest; returns the manifest."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    lines = []
    for i in range(n):
        waveform = babble(int(rng.uniform(*seconds) * 16_000), seed=i)
        soundfile.write(folder / f"u{i:03d}.flac", waveform, 16_000)
        lines.append(
            {
                "audio_filepath": f"u{i:03d}.flac",
                "duration": len(waveform) / 16_000,
                "speaker": f"s{i % 4}",
                "text": ["one", "two", "three"][i % 3],
            }
        )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest
