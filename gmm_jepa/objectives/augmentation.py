"""Noise for the online encoder: utterance mixing and additive noise (WavLM, arXiv 2110.13900)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MIX_DB = (-5.0, 5.0)
NOISE_DB = (-5.0, 20.0)


def disturb_into(
    out: np.ndarray,
    waveform: np.ndarray,
    rng: np.random.Generator,
    *,
    n_rows: int,
    row: int,
    read_row: Callable[[int], np.ndarray],
    mix_probability: float,
    noise_probability: float,
) -> None:
    """Write what the online encoder hears of one utterance: it alone, or another signal beside it.

    With `mix_probability` a stretch of another utterance, at most half as long as this one, is
    mixed in at -5..5 dB signal-to-noise ratio; with `noise_probability` another signal is added
    over the whole length at -5..20 dB.

    Args:
        out: (S,) float32, is filled.
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
        out[:] = waveform
        return
    mixing = draw < mix_probability
    other = read_row((row + 1 + int(rng.integers(n_rows - 1))) % n_rows)
    ratio_db = rng.uniform(*(MIX_DB if mixing else NOISE_DB))
    n_added = int(rng.integers(1, len(waveform) // 2 + 1)) if mixing else len(waveform)
    if len(other) == 0:
        out[:] = waveform
        return
    first = int(rng.integers(len(other)))
    start = int(rng.integers(len(waveform) - n_added + 1))
    stop = start + n_added
    out[:start], out[stop:] = waveform[:start], waveform[stop:]
    added = out[start:stop]
    _copy_stretch(other, first, added)
    added *= _gain(waveform, added, ratio_db)
    added += waveform[start:stop]


def _copy_stretch(signal: np.ndarray, start: int, out: np.ndarray) -> None:
    """Fill `out` with samples from `start` on; past the end they begin anew."""
    done = 0
    while done < len(out):
        part = signal[start : start + len(out) - done]
        out[done : done + len(part)] = part
        start, done = 0, done + len(part)


def _gain(signal: np.ndarray, added: np.ndarray, ratio_db: float) -> np.float32:
    """Factor that brings `added` to `ratio_db` below `signal`; 0 where it is silent."""
    added_power = _power(added)
    if added_power == 0.0:
        return np.float32(0.0)
    return np.float32(np.sqrt(_power(signal) / (added_power * 10.0 ** (ratio_db / 10.0))))


def _power(signal: np.ndarray) -> float:
    """Mean square. The float32 product errs by 1e-6 of it, and is five times as fast as float64."""
    return float(np.dot(signal, signal)) / len(signal)
