"""Open what the user names as one corpus, and check that all of it can be read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.base import Corpus, JoinedCorpus
from gmm_jepa.data.files import FileCorpus, find_audio
from gmm_jepa.data.manifest import ManifestCorpus, is_manifest
from gmm_jepa.data.packed import PackedCorpus, is_pack
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.data.workers import map_in_order
from gmm_jepa.errors import InputError


def open_corpus(
    sources: Sequence[str | Path] | str | Path,
    *,
    rejects: RejectLog,
    weights: Sequence[float] | None = None,
) -> Corpus:
    """Open folders of audio, JSONL manifests, audio files and packed folders as one corpus.

    Only headers are read, and none where a manifest gives durations. What cannot be used goes to
    `rejects`; whether that is too much is the caller's to ask
    (``rejects.check(len(corpus) + rejects.n_given, max_bad_fraction, n_bad=rejects.n_given)``).

    Args:
        sources: one or several; utterances keep their order.
        rejects: takes what cannot be used.
        weights: for each source, how often its utterances occur per epoch (1.0; fractions too).

    Raises:
        InputError: a source is absent or holds nothing usable, or `weights` do not fit.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if not sources:
        raise InputError("sources: at least one folder, manifest or audio file is needed, got none")
    if weights is None:
        weights = [1.0] * len(sources)
    if len(weights) != len(sources):
        raise InputError(f"weights: one per source is needed ({len(sources)}), got {len(weights)}")
    if "" in map(os.fspath, sources):
        raise InputError("sources: an empty path")
    if not any(weights):
        raise InputError("weights: one above 0 is needed")
    for source, weight in zip(sources, weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weights: 0 or more is needed for {source}, got {weight}")
    members = [_open_one(Path(source), rejects) for source in sources]
    if len(members) == 1 and weights[0] == 1.0:
        return members[0]
    return JoinedCorpus(members, [float(weight) for weight in weights])


def validate_corpus(
    corpus: Corpus,
    rejects: RejectLog,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Decode all audio and keep what is good.

    Args:
        corpus: what to read.
        rejects: takes the utterances that cannot be read.
        workers: processes that read.
        progress: called with utterances done and in all, after each.

    Returns:
        A view of the good utterances; `corpus` itself where all are.

    Raises:
        InputError: none is good.
    """
    good = find_readable(corpus, rejects, workers=workers, progress=progress)
    if not good.any():
        raise InputError(f"none of {len(corpus)} utterances can be read: {rejects.summary()}")
    return corpus if good.all() else corpus.select(good)


def find_readable(
    corpus: Corpus,
    rejects: RejectLog,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """As `validate_corpus`, but returns (N,) bool, True where an utterance can be read."""
    good = np.ones(len(corpus), bool)
    checks = map_in_order(_Check(corpus), range(len(corpus)), workers=workers, prefetch=8)
    for i, reject in enumerate(checks):
        if reject is not None:
            good[i] = False
            rejects.add(reject)
        if progress is not None:
            progress(i + 1, len(corpus))
    return good


_CHECKED_SAMPLES = 600 * SAMPLE_RATE_HZ
_SEEKS = (".wav", ".flac")
"""Other formats are decoded from the start for every window of them."""


class _Check:
    """Read an utterance to its end, a window at a time where that can be; the reject, or None."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus

    def __call__(self, i: int) -> Reject | None:
        n_samples = int(self._corpus.durations_samples[i])
        seeks = self._corpus.locate(i)[0].lower().endswith(_SEEKS)
        step = _CHECKED_SAMPLES if seeks else max(1, n_samples)
        try:
            for start in range(0, n_samples, step):
                self._corpus.read(i, start, min(step, n_samples - start))
        except AudioError as error:
            return self._corpus.reject(i, error)
        return None


def _open_one(source: Path, rejects: RejectLog) -> Corpus:
    before = rejects.count
    if not source.exists():
        raise InputError(f"sources: no such file or folder: {source}")
    if source.is_dir():
        if is_pack(source):
            return PackedCorpus(source)
        kind = "folder"
        corpus: Corpus = FileCorpus(source, find_audio(source, rejects), rejects)
    elif is_manifest(source):
        kind = "manifest"
        corpus = ManifestCorpus(source, rejects)
    else:
        kind = "file"
        corpus = FileCorpus(source.parent, [source.name], rejects)
    if len(corpus) == 0:
        why = f": {rejects.summary()}" if rejects.count > before else ""
        raise InputError(f"sources: {kind} {source} holds no usable audio{why}")
    return corpus
