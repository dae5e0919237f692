"""Manifests of corpora, on small look-alikes of their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gmm_jepa.cli import main
from gmm_jepa.downstream.folders import tagged


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def made(kind: str, folder: Path, out: Path) -> dict[str, list[dict]]:
    words = ["probe", "manifest", "--kind", kind, "--folder", str(folder), "--out", str(out)]
    assert main(words) == 0
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*"))
    }


def librispeech(root: Path) -> Path:
    for subset, speaker in (("train-clean-100", 19), ("dev-clean", 84), ("test-clean", 61)):
        chapter = root / subset / str(speaker) / "198"
        names = [f"{speaker}-198-{i:04d}" for i in range(2)]
        touch(chapter / f"{speaker}-198.trans.txt", "".join(f"{n} IT'S {n[0]}\n" for n in names))
        for name in names:
            touch(chapter / f"{name}.flac")
    return root


def iemocap(root: Path) -> Path:
    for session in (1, 2):
        name = f"Ses0{session}F_impro01"
        turns = [("F000", "neu"), ("M001", "exc"), ("F001", "fru"), ("M002", "sad"), ("F2", "xxx")]
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for i, (turn, emotion) in enumerate(turns):
            lines += [f"[{i}.2901 - {i}.8]\t{name}_{turn}\t{emotion}\t[2.5, 2.5, 2.5]"]
            lines += ["C-E2:\tNeutral;\t()", ""]
            touch(root / f"Session{session}/sentences/wav/{name}/{name}_{turn}.wav")
        touch(root / f"Session{session}/dialog/EmoEvaluation/{name}.txt", "\n".join(lines))
    return root


def snips(root: Path) -> Path:
    lines = []
    for part, speaker in (("train", "Ivy"), ("train", "Amy"), ("valid", "Amy"), ("test", "Brian")):
        name = f"{speaker}-snips-{part}-0"
        lines.append(f"{name} BOS play mozart now EOS\tO O artist O PlayMusic\n")
        touch(root / part / f"{name}.wav")
    touch(root / "train" / "Ivy-snips-train-9.wav")  # not in the list
    touch(root / "all.iob.snips.txt", "".join(lines))
    return root


def test_librispeech(tmp_path):
    found = made("librispeech", librispeech(tmp_path / "in"), tmp_path / "out")
    assert sorted(found) == ["dev-clean", "test-clean", "train-clean-100"]
    line = found["dev-clean"][1]
    assert line["id"] == "84-198-0001"
    assert line["speaker"] == "84"
    assert line["text"] == "IT'S 8"
    assert Path(line["audio_filepath"]).is_file()
    assert Path(line["audio_filepath"]).is_absolute()


def test_iemocap_keeps_four_classes_and_names_the_speaker_who_speaks(tmp_path):
    (lines,) = made("iemocap", iemocap(tmp_path / "in"), tmp_path / "out").values()
    assert [line["label"] for line in lines] == ["neu", "hap", "sad"] * 2
    assert [line["speaker"] for line in lines[:3]] == ["Ses01F", "Ses01M", "Ses01M"]
    assert [line["session"] for line in lines] == ["1"] * 3 + ["2"] * 3


def test_audio_snips_takes_superbs_speakers(tmp_path):
    found = made("audio-snips", snips(tmp_path / "in"), tmp_path / "out")
    assert {part: [line["speaker"] for line in lines] for part, lines in found.items()} == {
        "train": ["Ivy"],
        "valid": ["Amy"],
        "test": ["Brian"],
    }
    assert found["test"][0]["text"] == "PLAY B-artist MOZART E-artist NOW"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("BOS a b EOS\tO x x I", "B-x A B E-x"),
        ("BOS a b EOS\tO x y I", "B-x A E-x B-y B E-y"),
        ("BOS a b c EOS\tO B-x B-x I-x I", "B-x A E-x B-x B C E-x"),
        ("BOS a , b ! EOS\tO x x x O I", "B-x A B E-x"),
        ("BOS , a EOS\tO x O I", "A"),
        ("BOS rock & roll EOS\tO O O O I", "ROCK AND ROLL"),
    ],
)
def test_tags_of_words_become_slots(sentence, expected):
    assert tagged(sentence) == expected


def test_bad_folders_are_one_line_and_write_nothing(tmp_path, capsys):
    def said(kind: str, folder: Path) -> str:
        words = ["probe", "manifest", "--kind", kind, "--folder", str(folder)]
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.strip()

    (tmp_path / "empty").mkdir()
    for kind, folder in (("librispeech", "empty"), ("iemocap", "empty"), ("audio-snips", "no")):
        assert said(kind, tmp_path / folder).count("\n") == 0
    root = librispeech(tmp_path / "libri")
    next(root.rglob("84-198-0001.flac")).unlink()
    assert "84-198.trans.txt, line 2: no audio" in said("librispeech", root)
    root = snips(tmp_path / "snips")
    with (root / "all.iob.snips.txt").open("a") as file:
        file.write("Amy-snips-valid-1 BOS a EOS\tO O\n")
    assert "all.iob.snips.txt, line 5: expected BOS" in said("audio-snips", root)


def test_manifests_are_not_written_over(tmp_path, capsys):
    root, out = librispeech(tmp_path / "in"), tmp_path / "out"
    touch(out / "test-clean.jsonl", "mine")
    words = ["probe", "manifest", "--kind", "librispeech", "--folder", str(root)]
    assert main([*words, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["test-clean.jsonl"]
