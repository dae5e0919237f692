"""Scores against hand-computed cases, jiwer and scikit-learn."""

from __future__ import annotations

import math
import random

import jiwer
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix

from gmm_jepa.downstream import metrics


def test_word_and_character_error_rates_by_hand():
    references = ["THE CAT SAT", "DOG"]
    hypotheses = ["THE BAT", "A DOG"]
    assert metrics.word_error_rate(hypotheses, references) == pytest.approx(100 * 3 / 4)
    edits = 1 + 4 + 2  # C to B, " SAT" missing, "A " added
    assert metrics.character_error_rate(hypotheses, references) == pytest.approx(100 * edits / 14)


def test_nothing_said_is_all_wrong_and_nothing_to_say_has_no_rate():
    assert metrics.word_error_rate([""], ["A B"]) == 100
    assert metrics.word_error_rate(["A B C"], ["X"]) == 300
    assert math.isnan(metrics.word_error_rate(["A"], [""]))


def test_edit_distance_equals_jiwers():
    draw = random.Random(0)
    for _ in range(60):
        a, b = ("".join(draw.choices("AB ", k=draw.randrange(1, 9))).strip() or "A" for _ in "ab")
        found = jiwer.process_characters(b, a)
        expected = found.substitutions + found.insertions + found.deletions
        assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == expected


def test_accuracy_and_confusion_equal_scikit_learns():
    classes = ["ang", "hap", "neu", "sad"]
    draw = np.random.default_rng(0)
    truth, answers = (draw.choice(classes[:n], 50).tolist() for n in (3, 4))
    assert metrics.accuracy(answers, truth) == pytest.approx(100 * accuracy_score(truth, answers))
    expected = confusion_matrix(truth, answers, labels=classes)
    np.testing.assert_array_equal(metrics.confusion(answers, truth, classes), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("PLAY IT", {}),
        ("SET B-color RED E-color", {"color": ["RED"]}),
        ("B-a ONE TWO E-a B-a THREE E-a", {"a": ["ONE TWO", "THREE"]}),
        ("B-a B-b X E-b Y E-a", {"a": ["X Y"]}),
        ("B-a X B-b Y E-a Z E-b", {"a": ["X Y"]}),
        ("B-a X", {}),
        ("X E-a", {}),
        ("B-a B-b X E-b", {"b": ["X"]}),
        ("B-a E-a", {}),
        ("B-a X E-b Y E-a", {"a": ["X Y"]}),
        ("B-a  X   Y  E-a", {"a": ["X Y"]}),
        ("B-a X E-a E-a B-a", {"a": ["X"]}),
        ("B-a B-a X E-a", {"a": ["X"]}),
    ],
)
def test_slots_are_parsed_from_the_left(text, expected):
    assert metrics.slots(text) == expected


@pytest.mark.parametrize(
    ("hypothesis", "reference", "f1", "cer"),
    [
        ("", "", 100, None),
        ("PLAY", "PLAY", 100, None),
        ("B-a X E-a", "PLAY", 0, None),
        ("", "B-a XY E-a", 0, 100),
        ("B-a XY E-a", "B-a XY E-a", 100, 0),
        ("B-a XY", "B-a XY E-a", 0, 100),
        ("B-b XY E-b", "B-a XY E-a", 0, 100),
        ("B-a XZ E-a", "B-a XY E-a", 100, 50),
        ("B-a XY E-a B-b Q E-b", "B-a XY E-a", 100 * 2 / 3, 0),
        ("B-a XY E-a", "B-a XY E-a B-b QQ E-b", 100 * 2 / 3, 50),
        ("B-a XY E-a", "B-a XY E-a B-a XZZ E-a", 100, 100 * 2 / 5),
        ("B-a Q E-a B-a XY E-a", "B-a XY E-a", 100, 0),
        ("B-a B-b X E-b E-a", "B-a X E-a", 100, 0),
        ("B-a LONGER E-a", "B-a X E-a", 100, 600),
    ],
)
def test_slot_scores_of_one_utterance(hypothesis, reference, f1, cer):
    assert metrics.slot_type_f1([hypothesis], [reference]) == pytest.approx(f1)
    found = metrics.slot_value_cer([hypothesis], [reference])
    assert math.isnan(found) if cer is None else found == pytest.approx(cer)


def test_f1_is_a_mean_over_utterances_and_cer_a_sum_over_values():
    hypotheses = ["B-a XY E-a", "", "B-b Q E-b"]
    references = ["B-a XY E-a", "", "B-a ABCDEF E-a"]
    assert metrics.slot_type_f1(hypotheses, references) == pytest.approx(100 * 2 / 3)
    assert metrics.slot_value_cer(hypotheses, references) == pytest.approx(100 * 6 / 8)
