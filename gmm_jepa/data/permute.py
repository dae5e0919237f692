"""Shuffling by arithmetic: position in, place out, with nothing stored."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_MIN_HALF_BITS = 3  # shorter halves shuffle lists of two or three visibly unevenly


def permute(positions: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """Where a random permutation of 0..n-1 sends `positions`.

    A Feistel network over the next even power of two, walked until it comes back below `n`
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002); fewer than four walks for
    most. Platform- and version-independent.

    Args:
        positions: integers in 0..n-1, of any shape.
        n: length of the permuted list, up to 2^62.
        key: names the permutation.

    Returns:
        int64, of the shape of `positions`.
    """
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < n)
    half = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    places = positions.reshape(-1).astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        places[outside] = _feistel(places[outside], half, keys)
        outside = outside[places[outside] >= n]
    return places.astype(np.int64).reshape(positions.shape)


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that is a function of the key."""
    return int(_round_keys(key)[0] >> np.uint64(11)) * 2.0**-53


def _round_keys(key: tuple[int | str, ...]) -> np.ndarray:
    """(8,) uint64."""
    return np.frombuffer(hashlib.blake2b(repr(key).encode()).digest(), "<u8")


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for round_key in keys[:_ROUNDS]:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014); products wrap at 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
