"""Labels for probes: which tasks a manifest's keys allow, how they split, and per-frame phones."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.data.phone_labels import bad_phones, phone_segments
from gmm_jepa.evaluate.embed import FrameTable, Utterance

MOST_TEXTS = 50
"""More distinct transcripts than this are sentences, not classes."""
TEST_SHARE = 4
"""One utterance in so many tests where utterances are split; one speaker in three for speakers."""


@dataclass(frozen=True)
class Task:
    """A classification that the labels of a sample allow."""

    name: str
    """Manifest key: phones, text, speaker or label."""
    level: str
    """``"frame"`` or ``"utterance"``."""
    train: NDArray[np.int64]
    """Utterances the probe learns from."""
    test: NDArray[np.int64]
    """Utterances it is tested on."""
    split: str
    """In words, for the report."""


@dataclass(frozen=True)
class ProbeData:
    """Rows of a feature table and their classes."""

    train_rows: NDArray[np.int64]
    train_classes: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    test_classes: NDArray[np.int64]
    """-1 where training never shows the class: such a row cannot be answered correctly."""
    test_groups: NDArray[np.int64]
    """Utterance of each test row."""
    classes: list[str]


def frame_phones(entry: dict[str, Any], centres_s: NDArray[np.float64]) -> list[str | None]:
    """The phone whose segment [start, end) holds each frame's centre; None between segments."""
    segments = phone_segments(entry)
    if segments is None:
        return [None] * len(centres_s)
    starts, ends, symbols = segments
    found = np.searchsorted(starts, centres_s, side="right") - 1
    return [
        symbols[i] if i >= 0 and centre < ends[i] else None for i, centre in zip(found, centres_s)
    ]


def find_tasks(utterances: Sequence[Utterance], *, seed: int) -> list[Task]:
    """Tasks that the labels allow, each with a deterministic split.

    - ``phones`` on frames; ``text`` (where it has few distinct values), ``label`` and ``speaker``
      on utterances.
    - Test speakers are unseen in training of the probe, but for the speaker task: the held-out
      corpus if its speakers are others, else one speaker in three where three or more are named.
    - Otherwise by utterance: the held-out corpus, or for speakers who occur in one corpus only,
      one utterance in four of every speaker.

    Either may test on audio that pretraining heard, without labels; `Task.split` says on how much.
    Malformed phones are told of on standard error.
    """
    warning = bad_phones(utterance.entry for utterance in utterances)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    tasks = []
    for name in ("phones", "text", "label", "speaker"):
        labels = [_label(utterance, name) for utterance in utterances]
        labelled = np.array([u for u, label in enumerate(labels) if label is not None], np.int64)
        distinct = Counter(label for label in labels if label is not None)
        if name != "phones" and not _are_classes(name, distinct):
            continue
        chosen = [utterances[u] for u in labelled]
        test, split = _split_by(name, chosen, [labels[u] for u in labelled], seed)
        if test.any() and not test.all():
            n_heard = sum(not utterances[u].heldout for u in labelled[test])
            split += f"; {n_heard or 'none'} of {test.sum()} from the training corpus, unlabelled"
            level = "frame" if name == "phones" else "utterance"
            tasks.append(Task(name, level, labelled[~test], labelled[test], split))
    return tasks


def _label(utterance: Utterance, name: str) -> str | None:
    if name == "phones":
        return "phones" if phone_segments(utterance.entry) is not None else None
    value = utterance.entry.get(name)
    if value is None or not str(value).strip():
        return None
    return str(value).strip().lower() if name == "text" else str(value).strip()


def _are_classes(name: str, distinct: Counter[str]) -> bool:
    """Whether values repeat enough to be classes."""
    if len(distinct) < 2:
        return False
    few = name != "text" or len(distinct) <= MOST_TEXTS
    return few and distinct.total() >= 4 * len(distinct)


def _split_by(
    name: str, utterances: list[Utterance], labels: list[str | None], seed: int
) -> tuple[NDArray[np.bool_], str]:
    """Which utterances test, and the split in words."""
    heldout = np.array([u.heldout for u in utterances], dtype=bool)
    speakers = np.array([u.speaker or "" for u in utterances], dtype=object)
    here, there = set(speakers[~heldout]), set(speakers[heldout])
    named = (here | there) - {""}
    if name == "speaker":
        if heldout.any() and here == there:
            return heldout, "held-out utterances"
        return _one_in_four(labels, seed), "one utterance in four of every speaker"
    if there and here and "" not in here | there and not here & there:
        return heldout, f"{len(there)} unseen speakers (the held-out corpus)"
    if len(named) >= 3 and "" not in here | there:
        order = np.random.default_rng(seed).permutation(np.array(sorted(named), dtype=object))
        unseen = order[: max(1, len(order) // 3)]
        split = f"{len(unseen)} of {len(order)} speakers, unseen by the probe"
        return np.isin(speakers, unseen), split
    return heldout, "held-out utterances"


def _one_in_four(labels: Sequence[str | None], seed: int) -> NDArray[np.bool_]:
    """A quarter of every class, rounded down, at random."""
    test = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(seed)
    names = np.array(labels, dtype=object)
    for name in sorted(set(names)):
        mine = random.permutation(np.flatnonzero(names == name))
        test[mine[: len(mine) // TEST_SHARE]] = True
    return test


def probe_data(task: Task, utterances: Sequence[Utterance], table: FrameTable) -> ProbeData:
    """Rows of `table` (of its `pooled()` for utterance tasks) with their classes."""
    rows: list[NDArray[np.int64]] = []
    symbols: list[list[str]] = []
    groups: list[NDArray[np.int64]] = []
    for chosen in (task.train, task.test):
        found = [_labelled_rows(task, utterances, table, int(u)) for u in chosen]
        rows.append(np.concatenate([place for place, _ in found]).astype(np.int64))
        symbols.append([symbol for _, names in found for symbol in names])
        groups.append(np.repeat(chosen, [len(names) for _, names in found]))
    classes = sorted(set(symbols[0]))
    number = {symbol: c for c, symbol in enumerate(classes)}
    train, test = (
        np.array([number.get(symbol, -1) for symbol in part], np.int64) for part in symbols
    )
    return ProbeData(rows[0], train, rows[1], test, groups[1], classes)


def _labelled_rows(
    task: Task, utterances: Sequence[Utterance], table: FrameTable, u: int
) -> tuple[NDArray[np.int64], list[str]]:
    if task.level == "utterance":
        empty = table.offsets[u] == table.offsets[u + 1]
        label = _label(utterances[u], task.name)
        return (np.zeros(0, np.int64), []) if empty else (np.array([u]), [str(label)])
    phones = frame_phones(utterances[u].entry, table.centres_s(u))
    places = [t for t, phone in enumerate(phones) if phone is not None]
    rows = table.offsets[u] + np.array(places, dtype=np.int64)
    return rows, [str(phones[t]) for t in places]
