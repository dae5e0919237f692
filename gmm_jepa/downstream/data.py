"""Utterances with their answers, and which of them teach, choose and test."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.data.base import Corpus, JoinedCorpus, hash_parts
from gmm_jepa.data.manifest import ManifestCorpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.downstream.settings import TaskName
from gmm_jepa.downstream.vocabulary import normalise, normalise_slots
from gmm_jepa.errors import InputError

PARTS = ("train", "dev", "test")
IEMOCAP_DEV_SHARE = 0.2
SAME_S = 0.01
"""Two pieces of a file may have so much in common: times in manifests are rounded."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Places of utterances in the corpus; no audio is in two parts."""

    train: Indices
    dev: Indices
    test: Indices
    name: str = ""
    """Of the group that is tested, where several folds are."""


@dataclass(frozen=True)
class Labelled:
    """A corpus with one answer an utterance."""

    corpus: Corpus
    answers: tuple[str, ...]
    """Normalised text, tagged text or class."""
    ids: tuple[str, ...]
    folds: tuple[Fold, ...]
    """One, or as many as there are groups to be tested in turn."""
    key: str
    """Of the answers in the manifests."""
    split_by: str | None = None
    """Key by whose values one manifest was cut; None: by nothing or utterance, or given so."""

    @property
    def fingerprint(self) -> str:
        """Of the audio's list, the answers and the folds."""
        places = [part.tobytes() for f in self.folds for part in (f.train, f.dev, f.test)]
        return hash_parts(self.corpus.fingerprint, json.dumps(self.answers), *places)


def read_parts(
    train: Sequence[Path], dev: Sequence[Path], test: Sequence[Path], task: TaskName, key: str
) -> Labelled:
    """Manifests of the three parts; a part may have several.

    Args:
        train, dev, test: JSONL manifests.
        task: decides how answers are read.
        key: of the answer in a line.

    Raises:
        InputError: a file, a line or an answer cannot be used, or a manifest or the same audio is
            in two parts; the message names file and line.
    """
    given = dict(zip(PARTS, (train, dev, test)))
    for name, paths in given.items():
        if not paths:
            raise InputError(f"--{name}: expected a manifest, got none")
    paths = [Path(path) for part in given.values() for path in part]
    real = [path.resolve() for path in paths]
    twice = next((path for i, path in enumerate(real) if path in real[:i]), None)
    if twice is not None:
        raise InputError(f"{twice}: given twice among --train, --dev and --test")
    opened = [open_manifest(path) for path in paths]
    corpus = JoinedCorpus(opened, [1.0] * len(opened))
    sizes = [len(part) for part in given.values()]
    lengths, places = iter(map(len, opened)), []
    start = 0
    for size in sizes:
        stop = start + sum(next(lengths) for _ in range(size))
        places.append(np.arange(start, stop))
        start = stop
    return _labelled(corpus, task, key, (Fold(*places),))


def read_split(
    path: Path, task: TaskName, key: str, *, by: str, dev: float, test: float, seed: int
) -> Labelled:
    """One manifest cut into three parts, the same way every time.

    Args:
        path: JSONL manifest.
        task, key: see `read_parts`.
        by: key whose values stay together, such as ``speaker``; or ``utterance``.
        dev, test: shares of the duration, reached and not undercut.
        seed: of the choice.

    Raises:
        InputError: see `read_parts`; or fewer than three groups, or a line without the key.
    """
    corpus = open_manifest(path)
    groups = group_numbers(corpus, by)
    labelled = _labelled(corpus, task, key, (split(groups, corpus, by, dev, test, seed),))
    return labelled if by == "utterance" else replace(labelled, split_by=by)


def read_folds(path: Path, task: TaskName, key: str, *, by: str, seed: int) -> Labelled:
    """One manifest, of which every group is tested once, as SUPERB does with IEMOCAP's sessions.

    Of the other utterances a fifth, drawn at random, is the dev part.

    Raises:
        InputError: see `read_split`.
    """
    if by == "utterance":
        raise InputError("--folds: expected --split-by a key such as session, got utterance")
    corpus = open_manifest(path)
    names = [str(value) for value in _values(corpus, by)]
    folds = []
    for name in sorted(set(names)):
        tested = np.array([n == name for n in names])
        rest = np.random.default_rng(seed).permutation(np.flatnonzero(~tested))
        n_dev = max(1, round(IEMOCAP_DEV_SHARE * len(rest)))
        if len(rest) < 2:
            raise InputError(f"{path}: too few utterances outside {by} {name} to learn from")
        dev, train = np.sort(rest[:n_dev]), np.sort(rest[n_dev:])
        folds.append(Fold(train, dev, np.flatnonzero(tested), name))
    if len(folds) < 2:
        raise InputError(f"{path}: expected two values of {by!r} or more, got {len(folds)}")
    return _labelled(corpus, task, key, tuple(folds))


def open_manifest(path: Path) -> Corpus:
    """A manifest all of whose lines can be used.

    Raises:
        InputError: the file is absent or empty, or a line is bad; the message names it.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such manifest")
    rejects = RejectLog()
    corpus = ManifestCorpus(path, rejects)
    if rejects.count:
        first = next(iter(rejects))
        file = "" if first.manifest is None else f"{first.file}: "
        more = f" (and {rejects.count - 1} more lines)" if rejects.count > 1 else ""
        raise InputError(f"{path}, line {first.line}: {file}{first.reason}{more}")
    if not len(corpus):
        raise InputError(f"{path}: holds no utterance")
    return corpus


def place(corpus: Corpus, i: int) -> str:
    """Where an utterance is written: manifest and line."""
    _, line, manifest = corpus.locate(i)
    return f"{manifest}, line {line}"


def group_numbers(corpus: Corpus, by: str) -> Indices:
    """(N,) number of each utterance's group: those with the same value of a key, or itself.

    Raises:
        InputError: a line lacks the key.
    """
    if by == "utterance":
        return np.arange(len(corpus))
    return np.unique([str(value) for value in _values(corpus, by)], return_inverse=True)[1]


def split(groups: Indices, corpus: Corpus, by: str, dev: float, test: float, seed: int) -> Fold:
    """Whole groups, in random order: first test, then dev, then train, none of them empty.

    Raises:
        InputError: fewer than three groups, or shares that leave nothing.
    """
    if not (dev > 0 and test > 0 and dev + test < 1):
        raise InputError(
            f"dev_share, test_share: expected above 0, below 1 together, got {dev} and {test}"
        )
    seconds = np.bincount(groups, weights=corpus.durations_samples)
    n = len(seconds)
    if n < 3:
        raise InputError(f"split_by: expected three values of {by!r} or more, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    reached = np.cumsum(seconds[order]) / seconds.sum()
    first = min(int(np.argmax(reached >= test)) + 1, n - 2)
    second = int(np.argmax(reached >= reached[first - 1] + dev)) + 1
    second = min(max(second, first + 1), n - 1)
    chosen = (order[second:], order[first:second], order[:first])
    train, dev_part, test_part = (np.flatnonzero(np.isin(groups, c)) for c in chosen)
    return Fold(train, dev_part, test_part)


def _values(corpus: Corpus, key: str) -> list[object]:
    values = []
    for i in range(len(corpus)):
        value = corpus.entry(i).get(key)
        if value is None:
            raise InputError(f"{place(corpus, i)}: no key {key!r} to split by")
        values.append(value)
    return values


def _labelled(corpus: Corpus, task: TaskName, key: str, folds: tuple[Fold, ...]) -> Labelled:
    read: Callable[[str], str] = {"asr": normalise, "sf": normalise_slots, "er": str.strip}[task]
    answers, ids = [], []
    for i in range(len(corpus)):
        entry = corpus.entry(i)
        value = entry.get(key)
        if task == "er" and isinstance(value, int):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{place(corpus, i)}: {key}: expected text, got {value!r}")
        try:
            answers.append(read(value))
        except ValueError as error:
            raise InputError(f"{place(corpus, i)}: {key}: {error}") from None
        if not answers[-1]:
            raise InputError(f"{place(corpus, i)}: {key}: {value!r} holds no letter")
        ids.append(str(entry["id"]))
    _refuse_shared(corpus, folds)
    return Labelled(corpus, tuple(answers), tuple(ids), folds, key)


class _Piece(NamedTuple):
    """Audio of one utterance."""

    file: str
    """Where it really is."""
    start_s: float
    stop_s: float
    part: str
    """Of a fold."""
    utterance: int


def _refuse_shared(corpus: Corpus, folds: tuple[Fold, ...]) -> None:
    """Raise `InputError` where two parts of a fold have some audio in common."""
    entries = [corpus.entry(i) for i in range(len(corpus))]
    files = [os.path.realpath(entry["audio_filepath"]) for entry in entries]
    for fold in folds:
        pieces = []
        for part in PARTS:
            for i in getattr(fold, part).tolist():
                start_s = float(entries[i].get("offset") or 0.0)
                pieces.append(_Piece(files[i], start_s, start_s + entries[i]["duration"], part, i))
        for _, of_file in itertools.groupby(sorted(pieces), key=lambda piece: piece.file):
            _refuse_overlap(corpus, of_file)


def _refuse_overlap(corpus: Corpus, pieces: Iterable[_Piece]) -> None:
    """Of one file, by their starts."""
    furthest: dict[str, _Piece] = {}  # of each part
    for piece in pieces:
        for other in furthest.values():
            if other.part != piece.part and other.stop_s > piece.start_s + SAME_S:
                a, b = sorted((piece, other), key=lambda p: PARTS.index(p.part))
                raise InputError(
                    f"{place(corpus, b.utterance)}: the same audio in {b.part} as in {a.part}, "
                    f"{place(corpus, a.utterance)}"
                )
        own = furthest.setdefault(piece.part, piece)
        if piece.stop_s > own.stop_s:
            furthest[piece.part] = piece
