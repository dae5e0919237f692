"""Shuffling by arithmetic: position in, place out, with nothing stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_ROUNDS = 12  # with 8, lists of five or six come out visibly unevenly (chi-square, 6,000 keys)
_LOW_64 = (1 << 64) - 1

Numbers = TypeVar("Numbers", int, np.ndarray)  # (n,) uint64 where they are many


def permute(positions: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """Where a random permutation of 0..n-1 sends `positions`.

    A Feistel network over a x b >= n numbers, a and b about the root of n, walked until it comes
    back below `n` (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002); a x b exceeds
    n by less than a, so nearly all come back at once. Platform- and version-independent.

    Args:
        positions: integers in 0..n-1, of any shape.
        n: length of the permuted list, up to 2^62.
        key: names the permutation.

    Returns:
        int64, of the shape of `positions`.
    """
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < n)
    a, b = _sides(n)
    keys = _round_keys(key)
    places = positions.reshape(-1).astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        places[outside] = _feistel(places[outside], a, b, keys)
        outside = outside[places[outside] >= n]
    return places.astype(np.int64).reshape(positions.shape)


def permute_one(position: int, n: int, *key: int | str) -> int:
    """What `permute` gives for one position, in Python's own numbers: in a tenth of the time."""
    assert 0 <= position < n
    a, b = _sides(n)
    keys = _round_keys(key).tolist()
    place = _feistel(position, a, b, keys)
    while place >= n:
        place = _feistel(place, a, b, keys)
    return place


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that is a function of the key."""
    return int(_round_keys(key)[0] >> np.uint64(11)) * 2.0**-53


def _round_keys(key: tuple[int | str, ...]) -> np.ndarray:
    """(_ROUNDS,) uint64."""
    stream = hashlib.shake_128(repr(key).encode()).digest(8 * _ROUNDS)
    return np.frombuffer(stream, "<u8").astype(np.uint64)


def _sides(n: int) -> tuple[int, int]:
    a = math.isqrt(max(0, n - 1)) + 1
    return a, -(-n // a)


def _feistel(x: Numbers, a: int, b: int, keys: Sequence[int] | np.ndarray) -> Numbers:
    """A permutation of 0..a*b-1: the parts of x in 0..a-1 and 0..b-1 shift each other in turn."""
    left, right = x // b, x % b
    for k in range(0, _ROUNDS, 2):
        left = (left + _mix(right ^ keys[k]) % a) % a
        right = (right + _mix(left ^ keys[k + 1]) % b) % b
    return left * b + right


def _mix(z: Numbers) -> Numbers:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014); products wrap at 2^64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _LOW_64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _LOW_64
    return z ^ (z >> 31)
