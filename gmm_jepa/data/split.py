"""Which part of a corpus is held out for evaluation."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gmm_jepa.data.base import Corpus
from gmm_jepa.errors import InputError

MIN_SPEAKERS = 4
"""With fewer speakers whole ones cannot be spared, and utterances are held out instead."""
MAX_ENTRIES_READ = 1_000_000
"""Larger corpora are split by utterance without reading the speaker of every entry."""


def hold_out(
    corpus: Corpus,
    *,
    fraction: float,
    by: Literal["auto", "speaker", "utterance"],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Split a corpus, the same way for the same corpus and seed.

    Args:
        corpus: all audio.
        fraction: share of the audio's duration to hold out, in (0, 1); reached, not undercut.
        by: whole speakers, single utterances, or "auto": speakers where four or more are named.
        seed: of the choice.

    Returns:
        Indices of the training part and of the held-out part, both ascending.

    Raises:
        InputError: fewer than two utterances (or speakers, where these are asked for).
    """
    if len(corpus) < 2:
        raise InputError(
            f"audio: expected two usable utterances or more, so that one can be held out (or give "
            f"--heldout-audio), got {len(corpus)}"
        )
    groups = np.arange(len(corpus))
    if by == "speaker" or (by == "auto" and len(corpus) <= MAX_ENTRIES_READ):
        names = [corpus.entry(i).get("speaker") for i in range(len(corpus))]
        named = sorted({str(name) for name in names if name is not None})
        if by == "speaker" and len(named) < 2:
            raise InputError(f"heldout_by: expected two speakers or more, got {len(named)}")
        if by == "speaker" and None in names:
            raise InputError("heldout_by: speaker was asked for, but some entries name none")
        if None not in names and len(named) >= (MIN_SPEAKERS if by == "auto" else 2):
            number = {name: i for i, name in enumerate(named)}
            groups = np.array([number[str(name)] for name in names])
    heldout = _choose(groups, corpus.durations_samples, fraction, seed)
    return np.flatnonzero(~heldout), np.flatnonzero(heldout)


def _choose(groups: np.ndarray, durations: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whole groups in random order until `fraction` of the duration is reached; one stays."""
    seconds = np.bincount(groups, weights=durations)
    order = np.random.default_rng(seed).permutation(len(seconds))
    reached = np.cumsum(seconds[order]) >= fraction * seconds.sum()
    n_groups = min(int(np.argmax(reached)) + 1, len(order) - 1)
    return np.isin(groups, order[:n_groups])
