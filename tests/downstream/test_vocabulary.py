"""Texts to tokens and back."""

from __future__ import annotations

import pytest

from gmm_jepa.downstream.vocabulary import (
    CharacterVocabulary,
    SlotVocabulary,
    normalise,
    normalise_slots,
    slot_types,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Author of the danger trail, Philip Steels, etc.",
            "AUTHOR OF THE DANGER TRAIL PHILIP STEELS ETC",
        ),
        ("don’t stop", "DON'T STOP"),
        ("twenty-one — two", "TWENTY ONE TWO"),
        ("rock & roll", "ROCK AND ROLL"),
        ("  \t ", ""),
        ("straße", "STRASSE"),
    ],
)
def test_texts_become_words_of_letters(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize("text", ["7 days", "café", "на", "½"])
def test_other_letters_and_digits_are_refused_by_name(text):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        normalise(text)


def test_characters_follow_superbs_convention():
    vocabulary = CharacterVocabulary()
    assert len(vocabulary) == 32
    tokens = [vocabulary.tokens[i] for i in vocabulary.encode("A DOG'S")]
    assert tokens == ["A", "|", "D", "O", "G", "'", "S", "|", "</s>"]
    assert vocabulary.decode(vocabulary.encode("A DOG'S")) == "A DOG'S"
    assert vocabulary.decode([4, 4, 1, 5, 2, 4, 3, 6]) == "A B"


def test_slot_tags_touch_the_words_inside():
    text = normalise_slots("set the B-device lamp stand E-device, to B-colour red E-colour")
    assert text == "SET THE B-device LAMP STAND E-device TO B-colour RED E-colour"
    assert slot_types([text]) == ("colour", "device")
    vocabulary = SlotVocabulary(slot_types([text]))
    assert len(vocabulary) == 4 + 27 + 4
    tokens = [vocabulary.tokens[i] for i in vocabulary.encode("ON B-device A BC E-device THE")]
    expected = ["O", "N", " ", "B-device", "A", " ", "B", "C", "E-device", " ", "T", "H", "E"]
    assert tokens == [*expected, "<eos>"]
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_nested_slots_survive_the_way_there_and_back():
    text = normalise_slots("play B-work B-artist bach E-artist suite E-work now")
    vocabulary = SlotVocabulary(slot_types([text]))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_what_a_net_may_say_is_decoded_up_to_the_end_token():
    vocabulary = SlotVocabulary(["a"])
    opening, closing = vocabulary.encode("B-a X E-a")[0], vocabulary.encode("B-a X E-a")[2]
    assert vocabulary.decode([closing, opening, opening, 4, 1, 4]) == "E-a B-a B-a A"
    assert vocabulary.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B-a x", "never closed"),
        ("x E-a", "was not opened"),
        ("B-a x B-a y E-a E-a", "opened again"),
        ("B-a E-a x", "is empty"),
        ("B-a B-b E-b E-a x", "is empty"),
        ("B-a 7 E-a", "not in the vocabulary"),
        ("send an E-MAIL", "was not opened .'E-MAIL' reads as a slot tag"),
        ("play the B-SIDE", "'SIDE' is never closed .'B-SIDE' reads as a slot tag"),
    ],
)
def test_broken_slots_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        normalise_slots(text)
