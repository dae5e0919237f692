"""Files of text hold every name there is."""

from __future__ import annotations

import os

from gmm_jepa.cli import main
from gmm_jepa.files import write_text
from tests.audio import write_corpus


def test_names_that_are_in_no_encoding(tmp_path):
    write_text(tmp_path / "page", os.fsdecode(b"na\xefve.wav"))
    assert (tmp_path / "page").read_text(encoding="utf-8") == "na\\udcefve.wav"


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
