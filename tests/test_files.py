"""Files of text hold every name there is."""

from __future__ import annotations

import os

import pytest

from gmm_jepa.cli import main
from gmm_jepa.errors import InputError
from gmm_jepa.files import write_text
from tests.audio import write_corpus


def test_names_that_are_in_no_encoding(tmp_path):
    write_text(tmp_path / "page", os.fsdecode(b"na\xefve.wav"))
    assert (tmp_path / "page").read_text(encoding="utf-8") == "na\\udcefve.wav"


def test_a_folder_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").touch()
    with pytest.raises(InputError, match="mine is a folder; a file was to be written"):
        write_text(tmp_path / "mine", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "kept"]


def test_a_plan_replaces_plans_alone(tmp_path, capsys):
    words = ["plan", "--hours", "1", "--json", str(tmp_path / "plan.json")]
    assert main(words) == main(words) == 0
    (tmp_path / "manifest.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    assert main([*words[:-1], str(tmp_path / "manifest.jsonl")]) == 2
    assert "manifest.jsonl holds something else" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path)]) == 2


def test_a_run_on_such_files_ends_with_its_report(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(write_corpus(tmp_path / "audio").parent, folder)
    with open(folder + b"/na\xefve.wav", "wb") as file:
        file.write(b"RIFF")
    words = ["run", "--preset", "smoke", "--train.steps", "2", "--data.max-bad-fraction", "0.2"]
    run = tmp_path / "run"
    assert main([*words, "--audio", os.fsdecode(folder), "--out", str(run)]) == 0
    assert "na\\udcefve.wav" in (run / "report.html").read_text(encoding="utf-8")
    assert "report:" in capsys.readouterr().out
