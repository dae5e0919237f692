"""Which frames are hidden from the predictor."""

from __future__ import annotations

import numpy as np


def draw_mask(
    length_frames: int,
    rng: np.random.Generator,
    *,
    share: tuple[float, float],
    span_frames: tuple[int, int],
) -> np.ndarray:
    """Draw one utterance's mask: disjoint spans that together cover an exact share of it.

    The share is uniform in `share`; it is cut into spans of `span_frames` and the visible frames
    are spread over the gaps at random. An utterance too short for one span hides a single, shorter
    one; of two frames or more at least one stays visible.

    Args:
        length_frames: number of real frames T, 0 or more.
        rng: the only source of randomness.
        share: least and greatest share of masked frames.
        span_frames: shortest and longest span, 2 * shortest <= longest + 1 (so that some number
            of spans fills any count).

    Returns:
        (T,) bool, True where masked.
    """
    mask = np.zeros(length_frames, dtype=bool)
    if length_frames == 0:
        return mask
    target = round(rng.uniform(*share) * length_frames)
    n_masked = max(1, min(target, length_frames - 1))
    spans = _cut_into_spans(n_masked, rng, span_frames)
    n_visible = length_frames - n_masked
    visible_before = np.sort(rng.integers(0, n_visible + 1, size=len(spans)))
    start = 0
    for n_before, span in zip(visible_before, spans):
        mask[n_before + start : n_before + start + span] = True
        start += span
    return mask


def _cut_into_spans(
    n_masked: int, rng: np.random.Generator, span_frames: tuple[int, int]
) -> list[int]:
    """Lengths in `span_frames` that add up to `n_masked` (one shorter span if it is too few)."""
    short, long = span_frames
    if n_masked < short:
        return [n_masked]
    n_spans = int(rng.integers(-(-n_masked // long), n_masked // short + 1))
    spans = []
    for n_left in range(n_spans, 0, -1):
        least = max(short, n_masked - long * (n_left - 1))
        most = min(long, n_masked - short * (n_left - 1))
        spans.append(int(rng.integers(least, most + 1)))
        n_masked -= spans[-1]
    return spans
