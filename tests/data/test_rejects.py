from __future__ import annotations

import json

import pytest

from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.errors import InputError


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_file_and_line(tmp_path):
    log = RejectLog(tmp_path / "deep" / "rejects.jsonl")
    assert not log.path.exists()
    assert log.summary() == "none rejected"
    log.add(Reject("a.wav", None, "missing: no such file"))
    log.add(Reject("a.wav", None, "missing: no such file"))
    log.add(Reject("a.wav", 3, "truncated:\n two lines", manifest="set.jsonl"))
    log.extend([Reject("b.wav", None, "missing: no such file"), Reject("a.wav", None, "again")])
    assert log.count == 3
    assert lines(log.path) == [
        {"file": "a.wav", "line": None, "reason": "missing: no such file"},
        {"file": "a.wav", "line": 3, "reason": "truncated: two lines", "manifest": "set.jsonl"},
        {"file": "b.wav", "line": None, "reason": "missing: no such file"},
    ]
    assert log.summary() == f"3 rejected (2 missing, 1 truncated), see {log.path}"


def test_a_later_run_appends_and_repeats_nothing(tmp_path):
    path = tmp_path / "rejects.jsonl"
    RejectLog(path).add(Reject("a.wav", None, "missing"))
    with open(path, "a") as file:
        file.write('{"file": "cut sh')  # a crash in the middle of a line
    log = RejectLog(path)
    assert log.count == 0
    log.add(Reject("a.wav", None, "missing"))
    log.add(Reject("\udcff.wav", 1, "missing"))
    assert log.count == 2
    written = path.read_text().splitlines()
    assert len(written) == 3
    assert json.loads(written[2])["file"] == "\udcff.wav"


def test_check_names_counts_and_file(tmp_path):
    log = RejectLog(tmp_path / "rejects.jsonl")
    log.check(0, 0.0)
    log.add(Reject("a.wav", None, "missing: no such file"))
    log.check(100, 0.01)
    with pytest.raises(InputError, match=r"1 of 99 inputs are bad.*0\.01.*rejects\.jsonl"):
        log.check(99, 0.01)
    with pytest.raises(InputError, match="max_bad_fraction"):
        log.check(99, 1.5)


def test_in_memory():
    log = RejectLog(None)
    log.add(Reject("a.wav", None, "missing: no such file"))
    assert log.summary() == "1 rejected (1 missing)"


def test_a_limit_that_is_passed_comes_with_one_that_is_not():
    log = RejectLog()
    for i in range(5):
        log.add(Reject(f"{i}.wav", None, "missing: no such file"))
    with pytest.raises(InputError, match=r"0\.01 allows \(0\.218 would\)"):
        log.check(23, 0.01)
    log.check(23, 0.218)
