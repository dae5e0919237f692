"""Values as text, and nested settings under dotted names."""

from __future__ import annotations

import pytest

from gmm_jepa.report.words import count, dotted, plain, show


@pytest.mark.parametrize(
    ("value", "said"),
    [(True, "yes"), (0, "0"), (None, "none"), ([], "none"), ([1, False, "a"], "1, no, a")],
)
def test_json_values_in_words(value, said):
    assert plain(value) == said


def test_numbers_and_counts():
    assert (show(0.123, ".1f", scale=100), show(None, ".1f")) == ("12.3", "–")
    assert (count(0, "seed"), count(1, "seed")) == ("0 seeds", "1 seed")


def test_own_values_come_before_those_within():
    values = {"train": {"alarm": {"on": True}, "steps": 9}, "empty": {}, "seed": [0]}
    named = dotted(values)
    assert named == {"seed": [0], "train.steps": 9, "train.alarm.on": True}
    assert list(named) == ["seed", "train.steps", "train.alarm.on"]
    assert dotted(3) == {"": 3}
