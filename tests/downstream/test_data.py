"""Manifests, splits, and what is said about bad lines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gmm_jepa.downstream import data
from gmm_jepa.downstream.tasks import task_for
from gmm_jepa.errors import InputError

SHARES = {"dev": 0.2, "test": 0.2, "seed": 0}


def speakers(labelled: data.Labelled, places) -> set[str]:
    return {labelled.corpus.entry(int(i))["speaker"] for i in places}


@pytest.mark.parametrize("seed", range(4))
def test_no_speaker_is_in_two_parts_and_none_is_lost(manifest_of, seed):
    path = manifest_of("asr")
    found = data.read_split(path, "asr", "text", by="speaker", dev=0.2, test=0.2, seed=seed)
    again = data.read_split(path, "asr", "text", by="speaker", dev=0.2, test=0.2, seed=seed)
    (fold,) = found.folds
    parts = [speakers(found, part) for part in (fold.train, fold.dev, fold.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 4
    assert sorted(np.concatenate([fold.train, fold.dev, fold.test])) == list(range(12))
    assert found.fingerprint == again.fingerprint


def test_utterances_can_be_split_and_shares_are_kept(manifest_of):
    path = manifest_of("asr")
    (fold,) = data.read_split(path, "asr", "text", by="utterance", **SHARES).folds
    assert [len(p) for p in (fold.train, fold.dev, fold.test)] == [6, 3, 3]
    assert len({*fold.train, *fold.dev, *fold.test}) == 12


def test_folds_test_every_group_once(manifest_of):
    found = data.read_folds(manifest_of("er"), "er", "label", by="speaker", seed=0)
    assert [fold.name for fold in found.folds] == ["s0", "s1", "s2", "s3"]
    for fold in found.folds:
        assert speakers(found, fold.test) == {fold.name}
        assert fold.name not in speakers(found, [*fold.train, *fold.dev])
        assert len({*fold.train, *fold.dev, *fold.test}) == 12
    assert sorted(np.concatenate([f.test for f in found.folds])) == list(range(12))


def test_three_files_are_three_parts(manifest_of):
    parts = ((0, 5, "a"), (5, 3, "b"), (8, 4, "c"))
    paths = [[manifest_of("asr", n, name, first=first)] for first, n, name in parts]
    found = data.read_parts(*paths, "asr", "text")
    (fold,) = found.folds
    assert fold.train.tolist() == [0, 1, 2, 3, 4]
    assert fold.dev.tolist() == [5, 6, 7]
    assert fold.test.tolist() == [8, 9, 10, 11]
    assert found.answers[:3] == ("ONE TWO", "THREE", "IT'S")


def test_the_same_audio_is_in_one_part_only(manifest_of, tmp_path):
    parts = ((0, "a"), (4, "b"), (3, "c"))
    paths = [[manifest_of("asr", 4, name, first=first)] for first, name in parts]
    said = r"c\.jsonl, line 1: the same audio in test as in train, .*a\.jsonl, line 4"
    with pytest.raises(InputError, match=said):
        data.read_parts(*paths, "asr", "text")

    def cut(_i, line):
        line |= {"offset": 0.1, "duration": 0.2}

    paths[2] = [manifest_of("asr", 4, "c", cut, first=3)]
    with pytest.raises(InputError, match=said):  # of which the other part has the whole
        data.read_parts(*paths, "asr", "text")

    def first_tenth(_i, line):
        line |= {"offset": 0.0, "duration": 0.1}

    paths[:2] = [[manifest_of("asr", 4, n, first_tenth, first=i)] for i, n in parts[:2]]
    data.read_parts(*paths, "asr", "text")  # another part of a file is other audio

    paths[2] = [manifest_of("asr", 4, "c", first=3)]
    linked = tmp_path / "linked.wav"
    line = json.loads(paths[2][0].read_text().splitlines()[0])
    linked.symlink_to(tmp_path / line["audio_filepath"])
    paths[2][0].write_text(json.dumps(line | {"audio_filepath": str(linked)}) + "\n")
    with pytest.raises(InputError, match=said):  # by another name
        data.read_parts(*paths, "asr", "text")

    twice = manifest_of("er", 8, "twice")
    twice.write_text(2 * twice.read_text())
    with pytest.raises(InputError, match=r"twice\.jsonl, line \d+: the same audio"):
        data.read_split(twice, "er", "label", by="utterance", **SHARES)
    with pytest.raises(InputError, match=r"twice\.jsonl, line \d+: the same audio in dev"):
        data.read_folds(twice, "er", "label", by="speaker", seed=0)


def test_the_key_of_the_answers_is_named(manifest_of):
    path = manifest_of("asr", change=lambda _i, line: line.update(mood="one"))
    for task, said in (("er", "mood: expected two classes"), ("sf", "mood: no slot")):
        found = data.read_split(path, task, "mood", by="utterance", **SHARES)
        with pytest.raises(InputError, match=said):
            task_for(task, found)


@pytest.mark.parametrize(
    ("task", "key", "value", "said"),
    [
        ("asr", "text", "room 7", "line 3: text: character '7'"),
        ("asr", "text", None, "line 3: text: expected text, got None"),
        ("asr", "text", "?!", "holds no letter"),
        ("sf", "text", "B-a x", "line 3: text: slot 'a' is never closed"),
        ("er", "label", " ", "line 3: label: expected text"),
        ("asr", "speaker", None, "line 3: no key 'speaker' to split by"),
        ("asr", "audio_filepath", "", "line 3: no path"),
    ],
)
def test_bad_lines_are_named(manifest_of, task, key, value, said):
    path = manifest_of(task, change=lambda i, line: line.update({key: value}) if i == 2 else None)
    with pytest.raises(InputError, match=r"lines\.jsonl, line 3") as error:
        data.read_split(path, task, "label" if task == "er" else "text", by="speaker", **SHARES)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_are_named(manifest_of, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"audio_filepath": "nowhere.wav"}) + "\n{\n")
    with pytest.raises(InputError, match=r"broken\.jsonl, line 2: .*JSON.*1 more"):
        data.open_manifest(broken)
    with pytest.raises(InputError, match="no such manifest"):
        data.open_manifest(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="holds no utterance"):
        data.open_manifest(empty)
    same = manifest_of("asr")
    with pytest.raises(InputError, match="given twice"):
        data.read_parts([same], [same], [empty], "asr", "text")
    with pytest.raises(InputError, match="--test: expected a manifest"):
        data.read_parts([same], [same], [], "asr", "text")
    few = manifest_of("asr", 2, "few")
    with pytest.raises(InputError, match="three values of 'speaker'"):
        data.read_split(few, "asr", "text", by="speaker", **SHARES)


def test_a_class_that_goes_with_the_key_of_the_split_has_a_way_out(manifest_of):
    path = manifest_of("er")
    found = data.read_split(path, "er", "speaker", by="speaker", **SHARES)
    with pytest.raises(
        InputError, match=r"train part, as each speaker .*: try --split-by utterance"
    ):
        task_for("er", found)
    rare = manifest_of("er", 12, "rare", lambda i, line: line.update(label=f"{i}"))
    found = data.read_split(rare, "er", "label", by="utterance", **SHARES)
    with pytest.raises(InputError, match=r"does not occur in the train part$"):
        task_for("er", found)
