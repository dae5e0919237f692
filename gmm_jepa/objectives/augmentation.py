"""Noise for the online encoder: utterance mixing and additive noise (WavLM, arXiv 2110.13900)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MIX_DB = (-5.0, 5.0)
NOISE_DB = (-5.0, 20.0)


class Disturbance(NamedTuple):
    """What is added to an utterance, and where."""

    start_samples: int
    added: np.ndarray
    """(n,) float32."""


def draw_disturbance(
    waveform: np.ndarray,
    rng: np.random.Generator,
    *,
    n_rows: int,
    row: int,
    read_row: Callable[[int], np.ndarray],
    mix_probability: float,
    noise_probability: float,
) -> Disturbance | None:
    """What the online encoder hears beside one utterance; None: nothing.

    With `mix_probability` a stretch of another utterance, at most half as long as this one, is
    mixed in at -5..5 dB signal-to-noise ratio; with `noise_probability` another signal is added
    over the whole length at -5..20 dB.

    Args:
        waveform: (S,) float32, the clean utterance without padding.
        rng: the only source of randomness.
        n_rows: utterances in the global batch, from which the other signal is drawn.
        row: this utterance's place among them.
        read_row: gives the clean samples of another row, (S',) float32.
        mix_probability: chance of utterance mixing.
        noise_probability: chance of additive noise.
    """
    draw = rng.uniform()
    if draw >= mix_probability + noise_probability or n_rows < 2 or len(waveform) < 2:
        return None
    mixing = draw < mix_probability
    other = read_row((row + 1 + int(rng.integers(n_rows - 1))) % n_rows)
    ratio_db = rng.uniform(*(MIX_DB if mixing else NOISE_DB))
    n_added = int(rng.integers(1, len(waveform) // 2 + 1)) if mixing else len(waveform)
    if len(other) == 0:
        return None
    added = _stretch(other, int(rng.integers(len(other))), n_added)
    start = int(rng.integers(len(waveform) - n_added + 1))
    return Disturbance(start, _gain(waveform, added, ratio_db) * added)


def _stretch(signal: np.ndarray, start: int, n: int) -> np.ndarray:
    """`n` samples from `start` on; past the end it begins anew."""
    if start + n > len(signal):
        signal = np.tile(signal, -(-(start + n) // len(signal)))
    return signal[start : start + n]


def _gain(signal: np.ndarray, added: np.ndarray, ratio_db: float) -> np.float32:
    """Factor that brings `added` to `ratio_db` below `signal`; 0 where it is silent."""
    added_power = _power(added)
    if added_power == 0.0:
        return np.float32(0.0)
    return np.float32(np.sqrt(_power(signal) / (added_power * 10.0 ** (ratio_db / 10.0))))


def _power(signal: np.ndarray) -> float:
    """Mean square. The float32 product errs by 1e-6 of it, and is five times as fast as float64."""
    return float(np.dot(signal, signal)) / len(signal)
