"""What tells mixtures apart: no pair of small changes gives what was there before."""

from __future__ import annotations

import numpy as np
import pytest

from gmm_jepa.ops import native

if not native.instruction_sets():
    pytest.skip(f"native module: {native.status()}", allow_module_level=True)

N_WORDS = 400  # of 4 bytes: three blocks of the widest vectors and a part of one
ARRAYS = {
    "zeros": np.zeros(N_WORDS, np.float32),
    "ones": np.ones(N_WORDS // 2),
    "whole numbers": np.arange(N_WORDS // 2, dtype=np.float64),
    "drawn": np.random.default_rng(0).standard_normal(N_WORDS // 2),
}
FLIPS = np.uint32(1) << np.arange(32, dtype=np.uint32)


@pytest.fixture(params=native.instruction_sets())
def of(request):
    """The fingerprint of an array by one instruction set."""

    def fingerprint(values: np.ndarray) -> int:
        return native._native.fingerprint(values.ctypes.data, values.nbytes, request.param)

    return fingerprint


@pytest.mark.parametrize("name", ARRAYS)
def test_two_bits_in_two_words(of, name):
    """Words of one lane and of neighbouring ones; every pair of their bits, and single bits."""
    words = ARRAYS[name].view(np.uint32).copy()
    seen, n_arrays, first = {of(words)}, 1, 5
    for i in range(32):
        words[first] ^= FLIPS[i]
        seen.add(of(words))
        n_arrays += 1
        for distance in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            for flip in FLIPS:
                words[first + distance] ^= flip
                seen.add(of(words))
                words[first + distance] ^= flip
                n_arrays += 1
        words[first] ^= FLIPS[i]
    assert len(seen) == n_arrays


def test_round_changes_of_a_mixture(of):
    """Signs, halves and quarters of two means, wherever they are."""
    means = np.ones((4, 64))
    before, changes = of(means), (-1.0, 0.5, 1.25, 1.5, 2.0, 0.0)
    for k, d in ((0, 1), (1, 0), (2, 0), (3, 63)):
        for a in changes:
            for b in changes:
                means[0, 0], means[k, d] = a, b
                assert of(means) != before
                means[0, 0] = means[k, d] = 1.0
    assert of(means) == before


def test_the_places_and_the_number_of_values_count(of):
    values = np.arange(1.0, 200.0)
    first = of(values)
    for i, j in ((0, 1), (0, 8), (3, 67), (0, 64), (5, 197)):
        values[[i, j]] = values[[j, i]]
        assert of(values) != first
        values[[i, j]] = values[[j, i]]
    assert of(values) == first
    assert of(values[:-1]) != first
    assert of(np.zeros(64)) != of(np.zeros(128)) != of(np.zeros(0))
