"""Phones of frames, tasks that labels allow, and their splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gmm_jepa.evaluate import labels
from gmm_jepa.evaluate.embed import FrameTable, Utterance
from gmm_jepa.evaluate.phone_classes import broad_class

PHONES = [[0.0, 0.1, "sil"], [0.1, 0.15, "a"], [0.2, 0.3, "t"]]


def utterance(*, heldout: bool = False, **entry: Any) -> Utterance:
    return Utterance(np.zeros(1600, np.float32), entry, heldout)


def test_a_frame_takes_the_segment_that_holds_its_centre() -> None:
    centres = np.array([-0.01, 0.0, 0.0999, 0.1, 0.15, 0.2, 0.29, 0.3])
    found = labels.frame_phones({"phones": PHONES}, centres)
    assert found == [None, "sil", "sil", "a", None, "t", "t", None]


@pytest.mark.parametrize("phones", [None, [], "abc", [[0.0, "a"]], [[0, "x", "a"]], 3])
def test_no_or_malformed_phones_are_no_labels(phones: Any) -> None:
    assert labels.frame_phones({"phones": phones}, np.array([0.05])) == [None]


def test_unseen_speakers_of_the_heldout_corpus_test() -> None:
    sample = [utterance(heldout=True, speaker="c", phones=PHONES)] + [
        utterance(speaker=s, phones=PHONES) for s in "ab"
    ]
    (task,) = labels.find_tasks(sample, seed=0)
    assert (task.name, task.level) == ("phones", "frame")
    assert task.test.tolist() == [0]
    assert task.train.tolist() == [1, 2]
    assert task.split == (
        "1 unseen speakers (the held-out corpus); none of 1 from the training corpus, unlabelled"
    )


def test_speakers_are_split_where_the_corpora_share_them() -> None:
    sample = [
        utterance(heldout=h, speaker=s, text=t)
        for h in (True, False)
        for s in ("a", "b", "c", "d", "e", "f")
        for t in ("One", "two ", "one", "two")
    ]
    tasks = {task.name: task for task in labels.find_tasks(sample, seed=0)}
    assert set(tasks) == {"text", "speaker"}
    text = tasks["text"]
    speakers = [{sample[u].speaker for u in part} for part in (text.train, text.test)]
    assert [len(s) for s in speakers] == [4, 2]
    assert not speakers[0] & speakers[1]
    assert text.split == (
        "2 of 6 speakers, unseen by the probe; 8 of 16 from the training corpus, unlabelled"
    )
    assert "none of 24 from" in tasks["speaker"].split
    assert all(sample[u].heldout for u in tasks["speaker"].test)
    again = {task.name: task for task in labels.find_tasks(sample, seed=0)}
    assert again["text"].test.tolist() == text.test.tolist()


def test_speakers_of_one_corpus_only_are_split_by_utterance() -> None:
    sample = [utterance(heldout=s == "b", speaker=s) for s in "ab" for _ in range(9)]
    (task,) = labels.find_tasks(sample, seed=1)
    assert task.name == "speaker"
    assert sorted(sample[u].speaker for u in task.test) == ["a", "a", "b", "b"]
    assert "2 of 4 from the training corpus" in task.split


def test_few_speakers_fall_back_to_heldout_utterances() -> None:
    sample = [
        utterance(heldout=h, label=label, speaker="a")
        for h in (True, False)
        for label in (0, 1)
        for _ in range(4)
    ]
    (task,) = labels.find_tasks(sample, seed=0)
    assert task.name == "label"
    assert task.split == "held-out utterances; none of 8 from the training corpus, unlabelled"
    assert all(sample[u].heldout for u in task.test)


def test_sentences_and_single_values_are_no_classes() -> None:
    sample = [utterance(heldout=i < 20, text=f"sentence {i}", label="x") for i in range(80)]
    assert labels.find_tasks(sample, seed=0) == []
    assert labels.find_tasks([], seed=0) == []


def test_rows_of_frames_and_classes_unseen_in_training() -> None:
    sample = [utterance(phones=PHONES), utterance(phones=[[0.0, 1.0, "new"]], heldout=True)]
    task = labels.Task("phones", "frame", np.array([0]), np.array([1]), "")
    table = FrameTable(torch.zeros(9, 2), np.array([0, 5, 9]), 1600, 0.0)
    data = labels.probe_data(task, sample, table)
    # Centres 0, 0.1, 0.2, 0.3, 0.4 s: sil, a, t, none, none.
    assert data.classes == ["a", "sil", "t"]
    assert data.train_rows.tolist() == [0, 1, 2]
    assert data.train_classes.tolist() == [1, 0, 2]
    assert data.test_rows.tolist() == [5, 6, 7, 8]
    assert data.test_classes.tolist() == [-1] * 4
    assert data.test_groups.tolist() == [1] * 4


def test_rows_of_utterances_without_frames_are_left_out() -> None:
    sample = [utterance(label="x"), utterance(label="y"), utterance(label="x", heldout=True)]
    task = labels.Task("label", "utterance", np.array([0, 1]), np.array([2]), "")
    table = FrameTable(torch.zeros(4, 2), np.array([0, 2, 2, 4]), 320, 0.0)
    data = labels.probe_data(task, sample, table)
    assert data.train_rows.tolist() == [0]
    assert data.test_rows.tolist() == [2]
    assert data.test_classes.tolist() == [0]


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("oʊ", "vowel"),
        ("ɛɹ", "vowel"),
        ("AE1", "vowel"),
        ("ɹ", "approximant"),
        ("ŋ", "nasal"),
        ("NG", "nasal"),
        ("ð", "fricative"),
        ("SH", "fricative"),
        ("dʒ", "affricate"),
        ("tʃ", "affricate"),
        ("t", "stop"),
        ("ɡ", "stop"),
        ("sil", "silence"),
        ("", "silence"),
        ("#", "other"),
    ],
)
def test_broad_classes(symbol: str, expected: str) -> None:
    assert broad_class(symbol) == expected
