"""Phone labels for synthesised speech: espeak-ng's phoneme events made into gap-free intervals."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

SILENCE = "sil"

_STRESS_AND_LENGTH = frozenset("ˈˌː:")

# Variants that differ by accent or reduction more than by sound, and names rarer than 1 in 1000.
_FOLDED = {
    "a": "æ",
    "aɪə": "aɪ",
    "aɪɚ": "aɪ",
    "eə": "ɛɹ",
    "iə": "ɪɹ",
    "x": "k",
    "ɐ": "ə",
    "əl": "l",
    "əʊ": "oʊ",
    "ʊə": "ʊ",
    "ʊɹ": "ʊ",
    "ʔ": "t",
    "ᵻ": "ɪ",
}


def phone_symbol(name: str) -> str:
    """The class of an IPA name: stress, length and diacritics dropped, near-duplicates folded.

    >>> phone_symbol("ˈiː"), phone_symbol("n̩"), phone_symbol("əʊ")
    ('i', 'n', 'oʊ')
    """
    base = "".join(
        letter
        for letter in unicodedata.normalize("NFD", name)
        if letter not in _STRESS_AND_LENGTH and not unicodedata.combining(letter)
    )
    return _FOLDED.get(base, base)


def label_phones(
    onsets: Sequence[tuple[int, str]], samples: np.ndarray
) -> list[tuple[int, int, str]]:
    """Intervals that cover an utterance in order and without gaps.

    espeak-ng announces a stop at its burst; the closure before it, which the synthesiser fills with
    exact zeros, would fall to the phone before. As in forced alignment, it goes to the stop.
    A nameless event is a pause where the samples are zero, otherwise a glide within the phone
    before it. A phone without samples of its own (merged into its neighbour) is left out.

    Args:
        onsets: (sample, IPA name) of each event, in order.
        samples: ``(S,)`` integers as they came from the synthesiser, before any filter.

    Returns:
        (start sample, end sample, symbol), the first from 0 and the last to S; empty if S is 0.
    """
    sounding = np.flatnonzero(samples)
    last_sound = _end_of_last_sound(sounding, len(samples))
    spans: list[tuple[int, str]] = [(0, SILENCE)]
    ends = [*(onset for onset, _ in onsets), len(samples)][1:]
    for (onset, name), end in zip(onsets, ends, strict=True):
        if end <= onset:
            continue
        if name:
            start = onset
            if spans[-1][1] != SILENCE:  # a pause keeps its zeros
                start = max(int(last_sound[onset]), spans[-1][0])
            spans.append((start, phone_symbol(name)))
        elif last_sound[end] <= onset:
            spans.append((onset, SILENCE))
    return _close(spans, len(samples))


def _end_of_last_sound(sounding: np.ndarray, n_samples: int) -> np.ndarray:
    """``(S + 1,)``: for each position, one past the last non-zero sample before it (0: none)."""
    last = np.zeros(n_samples + 1, dtype=np.int64)
    last[sounding + 1] = sounding + 1
    return np.maximum.accumulate(last)


def _close(spans: Iterable[tuple[int, str]], n_samples: int) -> list[tuple[int, int, str]]:
    """Give each span its end, leaving out empty ones and joining neighbouring silences."""
    kept: list[tuple[int, str]] = []
    for start, symbol in spans:
        if kept and kept[-1][0] == start:
            kept.pop()
        if kept and kept[-1][1] == symbol == SILENCE:
            continue
        if start < n_samples:
            kept.append((start, symbol))
    ends = [*(start for start, _ in kept), n_samples][1:]
    return [(start, end, symbol) for (start, symbol), end in zip(kept, ends, strict=True)]
