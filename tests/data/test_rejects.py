from __future__ import annotations

import json

import pytest

from gmm_jepa.data.rejects import OPTION, Reject, RejectLog, check_fraction
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
    with pytest.raises(InputError, match=r"more than --data\.max-bad-fraction 0\.01 allows"):
        log.check(99, 0.01)
    with pytest.raises(InputError, match=r"more than --max-bad-fraction 0\.01 allows"):
        log.check(99, 0.01, option=OPTION)
    with pytest.raises(InputError, match=r"--data\.max-bad-fraction: expected between 0 and 1"):
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


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(InputError, match="--max-bad-fraction: expected between 0 and 1, got"):
        check_fraction(share)


def test_a_file_begun_anew_tells_of_its_own_log_only(tmp_path):
    path = tmp_path / "rejects.jsonl"
    RejectLog(path).extend([Reject("a.wav", None, "missing"), Reject("b.wav", None, "missing")])
    log = RejectLog(path, anew=True)
    assert len(lines(path)) == 2  # until it has something to tell
    log.add(Reject("b.wav", None, "truncated"))
    log.add(Reject("c.wav", None, "missing"))
    log.drop_earlier()
    assert [(line["file"], line["reason"]) for line in lines(path)] == [
        ("b.wav", "truncated"),
        ("c.wav", "missing"),
    ]
    RejectLog(path, anew=True).drop_earlier()
    assert not path.exists()


def test_only_a_list_of_rejects_is_begun_anew(tmp_path):
    path = tmp_path / "rejects.jsonl"
    for text in ('{"audio_filepath": "a.wav"}\n', '{"file": "a", "line": 1}\n', "notes", "[1]\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="something else than rejects"):
            RejectLog(path, anew=True)
        assert path.read_text() == text
    path.write_text("")
    RejectLog(path).add(Reject("a.wav", None, "missing"))
    path.write_text(path.read_text() + '{"file": "cut sh')
    RejectLog(path, anew=True).drop_earlier()
    assert not path.exists()


def test_given_often_is_counted_beside_distinct(tmp_path):
    log = RejectLog()
    log.extend(2 * [Reject("a.wav", None, "missing"), Reject("b.wav", None, "missing")])
    assert (log.count, log.n_given) == (2, 4)
