"""Scores of transcripts, classes and slots, all in percent, as SUPERB defines them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gmm_jepa.errors import require

_SLOT = re.compile(r"B-(\S+) (.+?) E-\1")
_OPENING, _CLOSING = re.compile(r"B-\S+ "), re.compile(r" E-\S+")


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits of words over all reference words, in percent; NaN where there are none."""
    if not any(reference.split() for reference in references):
        return float("nan")
    return 100 * require("jiwer", extra="probe").wer(list(references), list(hypotheses))


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits of characters (a space is one) over all reference characters, in percent."""
    if not any(references):
        return float("nan")
    return 100 * require("jiwer", extra="probe").cer(list(references), list(hypotheses))


def accuracy(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of equal answers, in percent."""
    return 100 * sum(h == r for h, r in zip(hypotheses, references)) / len(references)


def confusion(
    hypotheses: Sequence[str], references: Sequence[str], classes: Sequence[str]
) -> NDArray[np.int64]:
    """(C, C) counts: row is the reference's class, column the answer."""
    place = {name: i for i, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(table, ([place[r] for r in references], [place[h] for h in hypotheses]), 1)
    return table


def slots(text: str) -> dict[str, list[str]]:
    """Slot types of a tagged text, each with its values in order.

    A slot reads ``B-type value E-type``, found from the left without overlap; tags inside a value
    are stripped from it, and so are no slots of their own. What is never closed is no slot.

    >>> slots("PLAY B-artist B-name MOZART E-name E-artist NOW")
    {'artist': ['MOZART']}
    """
    found: dict[str, list[str]] = {}
    for kind, value in _SLOT.findall(" ".join(text.split())):
        found.setdefault(kind, []).append(_CLOSING.sub("", _OPENING.sub("", value)))
    return found


def slot_type_f1(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the set of slot types of an utterance, mean over utterances, in percent.

    Two empty sets count 1, one empty set 0.
    """
    return 100 * float(
        np.mean([_set_f1(set(slots(h)), set(slots(r))) for h, r in zip(hypotheses, references)])
    )


def _set_f1(answer: set[str], truth: set[str]) -> float:
    if not answer and not truth:
        return 1.0
    return 2 * len(answer & truth) / (len(answer) + len(truth))


def slot_value_cer(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits over characters of all reference slot values, in percent; NaN where there are none.

    A value is held against the answer's value of the same type that is nearest to it, or against
    nothing where the answer lacks the type; an answer may serve several.
    """
    edits = characters = 0
    for hypothesis, reference in zip(hypotheses, references):
        answers = slots(hypothesis)
        for kind, values in slots(reference).items():
            for value in values:
                edits += min(edit_distance(a, value) for a in answers.get(kind, [""]))
                characters += len(value)
    return 100 * edits / characters if characters else float("nan")


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
