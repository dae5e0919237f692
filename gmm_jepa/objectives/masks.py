"""Which frames are hidden from the predictor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

_LOW_32 = (1 << 32) - 1
_BLOCK = 32  # an utterance of 15 s takes about 20


def masked_count(
    length_frames: int, rng: np.random.Generator, *, share: tuple[float, float]
) -> int:
    """Draw how many of an utterance's frames are masked: one number of the generator.

    The share is uniform in `share`. Of two frames or more at least one stays visible.

    Args:
        length_frames: number of real frames T, 0 or more.
        rng: the only source of randomness.
        share: least and greatest share of masked frames.
    """
    if length_frames == 0:
        return 0
    target = round(rng.uniform(*share) * length_frames)
    return max(1, min(target, length_frames - 1))


def draw_mask(
    length_frames: int, n_masked: int, rng: np.random.Generator, *, span_frames: tuple[int, int]
) -> np.ndarray:
    """Draw one utterance's mask: disjoint spans that together cover `n_masked` frames.

    They are cut into spans of `span_frames`, and the visible frames are spread over the gaps at
    random. An utterance too short for one span hides a single, shorter one.

    Args:
        length_frames: number of real frames T, 0 or more.
        n_masked: of them, as `masked_count` draws it.
        rng: the only source of randomness.
        span_frames: shortest and longest span, 2 * shortest <= longest + 1 (so that some number
            of spans fills any count).

    Returns:
        (T,) bool, True where masked.
    """
    if length_frames == 0:
        return np.zeros(0, dtype=bool)
    words = _words(rng)
    spans = _cut_into_spans(n_masked, words, span_frames)
    n_visible = length_frames - n_masked
    runs, before = [], 0  # visible and masked frames in turn
    for n_before, span in zip(sorted(_below(n_visible + 1, words) for _ in spans), spans):
        runs += [n_before - before, span]
        before = n_before
    runs += [n_visible - before, 0]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _cut_into_spans(n_masked: int, words: Iterator[int], span_frames: tuple[int, int]) -> list[int]:
    """Lengths in `span_frames` that add up to `n_masked` (one shorter span if it is too few)."""
    short, long = span_frames
    if n_masked < short:
        return [n_masked]
    fewest, most = -(-n_masked // long), n_masked // short
    spans = []
    for n_after in reversed(range(fewest + _below(most - fewest + 1, words))):
        least = max(short, n_masked - long * n_after)
        most = min(long, n_masked - short * n_after)
        spans.append(least + _below(most - least + 1, words))
        n_masked -= spans[-1]
    return spans


def _words(rng: np.random.Generator) -> Iterator[int]:
    """Random numbers of 32 bits, two from each that the generator makes."""

    def blocks() -> Iterator[list[int]]:
        while True:
            numbers = rng.bit_generator.random_raw(_BLOCK).tolist()
            yield [half for number in numbers for half in (number & _LOW_32, number >> 32)]

    return chain.from_iterable(blocks())


def _below(n: int, words: Iterator[int]) -> int:
    """A random number in 0..n-1 (Lemire, arXiv 1805.10941).

    What a fresh `Generator.integers` gives, in a fifth of the time that a call of that takes.
    """
    if n == 1:
        return 0
    product = next(words) * n
    while (low := product & _LOW_32) < n and low < (1 << 32) % n:
        product = next(words) * n
    return product >> 32
