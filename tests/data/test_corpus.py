from __future__ import annotations

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from gmm_jepa.data.audio import AudioError, read_audio
from gmm_jepa.data.corpus import open_corpus, validate_corpus
from gmm_jepa.data.manifest import ManifestCorpus
from gmm_jepa.data.phone_labels import bad_phones, phone_segments
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.errors import InputError


def opened(sources, **options):
    log = RejectLog()
    return open_corpus(sources, rejects=log, **options), log


def records(path) -> dict[tuple[str, int | None], str]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (record["file"].rsplit("/", 1)[-1], record["line"]): record["reason"] for record in found
    }


def test_folder_is_recursive_sorted_and_mixed(write_audio, tmp_path):
    names = ["b/x.flac", "b/c/y.OGG", "a.wav", "b.wav", "z.mp3", "b/.hidden.wav", "ä ö.opus"]
    for i, name in enumerate(names):
        write_audio(name, seconds=0.1 + 0.02 * i)
    (tmp_path / "notes.txt").write_text("not listed")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    corpus, log = opened(tmp_path)
    found = [corpus.entry(i)["audio_filepath"] for i in range(len(corpus))]
    wanted = ["a.wav", "b/.hidden.wav", "b/c/y.OGG", "b/x.flac", "b.wav", "z.mp3", "ä ö.opus"]
    assert found == [str(tmp_path / name) for name in wanted]
    assert log.count == 0
    assert corpus.entry(2)["id"] == "b/c/y"
    assert corpus.durations_samples.tolist() == [len(corpus.read(i)) for i in range(len(corpus))]
    assert corpus.total_s == pytest.approx(corpus.durations_samples.sum() / 16_000)


@pytest.mark.parametrize("window", [None, 700])
def test_bad_files_in_a_folder_are_all_named(window, write_audio, tmp_path, monkeypatch):
    if window is not None:
        monkeypatch.setattr("gmm_jepa.data.corpus._CHECKED_SAMPLES", window)
    write_audio("data/good.wav")
    write_audio("data/empty.flac").write_bytes(b"")
    write_audio("data/text.wav").write_text("text " * 1000)
    write_audio("data/zero.wav", signal=np.zeros(0))
    cut = write_audio("data/cut.wav")
    cut.write_bytes(cut.read_bytes()[:-1000])
    late = write_audio("data/late.flac", seconds=2)
    late.write_bytes(late.read_bytes()[:-9000])
    nan = np.zeros(1000)
    nan[7] = np.nan
    write_audio("data/nan.wav", signal=nan, subtype="FLOAT")
    (tmp_path / "data/gone.wav").symlink_to(tmp_path / "absent.wav")
    log = RejectLog(tmp_path / "rejects.jsonl")
    corpus = open_corpus(tmp_path / "data", rejects=log)
    assert log.count == 5  # what headers tell
    good = validate_corpus(corpus, log)
    assert [good.entry(i)["id"] for i in range(len(good))] == ["good"]
    found = records(log.path)
    assert set(found) == {
        (name, None)
        for name in (
            "empty.flac",
            "text.wav",
            "zero.wav",
            "cut.wav",
            "late.flac",
            "nan.wav",
            "gone.wav",
        )
    }
    assert found["nan.wav", None].startswith("not finite")
    assert found["gone.wav", None].startswith("missing")
    with pytest.raises(InputError, match="7 of 8"):
        log.check(8, 0.5)


def test_manifest_keys_paths_and_windows(write_audio, write_manifest, tmp_path):
    a = write_audio("sets/audio/a.flac", seconds=2.0)
    whole = read_audio(a)
    phones = [[0.0, 0.5, "sil"], [0.5, 1.0, "a"]]
    path = write_manifest(
        [
            {"audio_filepath": "audio/a.flac", "duration": 2.0, "text": "é", "phones": phones},
            {"wav_path": str(a), "offset": 0.5, "duration": 1.0, "id": "mine", "extra": {"x": 1}},
            {"audio_path": "audio/a.flac", "offset": 1.25},
            {"path": "../sets/audio/a.flac", "speaker": "s", "label": 3},
        ],
        "sets/set.jsonl",
    )
    corpus, log = opened([path])
    assert log.count == 0
    assert corpus.durations_samples.tolist() == [32_000, 16_000, 12_000, 32_000]
    np.testing.assert_array_equal(corpus.read(0), whole)
    np.testing.assert_array_equal(corpus.read(1, 100, 50), whole[8_100:8_150])
    np.testing.assert_array_equal(corpus.read(2), whole[20_000:])
    first = corpus.entry(0)
    assert (first["id"], first["text"], first["phones"]) == ("audio/a", "é", phones)
    assert first["audio_filepath"] == str(a)
    assert corpus.entry(1)["id"] == "mine"
    assert corpus.entry(1)["extra"] == {"x": 1}
    assert corpus.entry(2) == {
        "id": "audio/a@1.25",
        "audio_path": "audio/a.flac",
        "offset": 1.25,
        "audio_filepath": str(a),
        "duration": 0.75,
    }
    assert corpus.locate(3) == (str(a), 4, str(path))
    for window in [(0, 0, 32_001), (0, -1, 5), (1, 16_001, None), (4, 0, 1), (-1, 0, 1)]:
        with pytest.raises(IndexError):
            corpus.read(*window)
        with pytest.raises(IndexError):
            corpus.read_into(*window[:2], np.empty(window[2] or 0, np.float32))
    into = np.full(50, np.nan, np.float32)
    corpus.select([3, 1]).read_into(1, 100, into)
    np.testing.assert_array_equal(into, whole[8_100:8_150])


def test_texts_hold_whole_characters(write_audio, write_manifest):
    """What JSON can escape and UTF-8 cannot hold, half of an emoji, would end a report."""
    write_audio("a.wav")
    odd = {"audio_filepath": "a.wav", "text": "hi \ud83d", "phones": [[0, 1, "\ud83d"]], "é": "é"}
    entry = opened([write_manifest([odd])])[0].entry(0)
    assert (entry["text"], entry["phones"][0][2], entry["é"]) == ("hi \\ud83d", "\\ud83d", "é")


@pytest.mark.parametrize(("path", "name"), [(".", "."), ("/", "/"), ("b.c/d.e.wav", "b.c/d.e")])
def test_names_of_odd_paths(write_manifest, path, name):
    line = {"audio_filepath": path, "duration": 1.0}
    assert opened([write_manifest([line])])[0].entry(0)["id"] == name


def test_bad_lines_are_named_by_number(write_audio, write_manifest, tmp_path):
    write_audio("a.wav")
    lines = [
        '\ufeff{"path": "a.wav", "duration": 0.5}',
        "",
        '{"path": "a.wav", "dura',
        '{"text": "no path here"}',
        '["a.wav"]',
        '{"path": 7}',
        '{"path": ""}',
        '{"path": "a.wav", "duration": -1}',
        '{"path": "a.wav", "duration": NaN}',
        '{"path": "a.wav", "duration": "long"}',
        '{"path": "a.wav", "duration": true}',
        '{"path": "a.wav", "offset": 1e400}',
        '{"path": "a.wav", "duration": 0}',
        '{"path": "a.wav", "offset": 0.5}',
        '{"path": "absent.wav"}',
        '{"path": "a.wav", "duration": 0.5}\r',
        "[" * 100_000,
        '{"path": "a.wav"}',
    ]
    path = write_manifest(lines)
    path.write_bytes(path.read_bytes() + b'{"path": "\xff.wav"}\n' + b'{"path": "a.wav"}')
    log = RejectLog(tmp_path / "rejects.jsonl")
    corpus = open_corpus(path, rejects=log)
    assert len(corpus) == 4
    assert [corpus.locate(i)[1] for i in range(4)] == [1, 16, 18, 20]
    assert all(len(corpus.read(i)) == 8_000 for i in range(4))
    found = {line: reason for (_, line), reason in records(log.path).items()}
    assert sorted(found) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19]
    starts = {3: "bad JSON", 4: "no path", 5: "bad JSON", 8: "bad duration", 12: "bad offset"}
    starts |= {13: "empty", 14: "empty", 15: "missing", 17: "bad JSON", 19: "bad JSON"}
    for line, start in starts.items():
        assert found[line].startswith(start), found[line]


def test_a_wrong_duration_is_a_reject_and_a_rounded_one_is_not(
    write_audio, write_manifest, tmp_path
):
    write_audio("a.wav", seconds=1.0)
    lines = [
        {"path": "a.wav", "duration": 0.5},
        {"path": "a.wav", "duration": 1.015},
        {"path": "a.wav", "duration": 1.05},
        {"path": "a.wav", "duration": 0.9, "offset": 0.5},
        {"path": "gone.wav", "duration": 1.0},
    ]
    corpus, log = opened(write_manifest(lines))
    assert len(corpus.read(0)) == 8_000
    rounded = corpus.read(1)
    assert rounded.shape == (16_240,)
    assert not rounded[16_000:].any()
    assert corpus.read(1, 16_100, 100).shape == (100,)
    with pytest.raises(AudioError, match="truncated: 16800 samples expected, the file holds 16000"):
        corpus.read(2, 0, 10)
    good = validate_corpus(corpus, log)
    assert len(good) == 2
    assert log.summary() == "3 rejected (2 truncated, 1 missing)"


def test_sources_join_with_weights(write_audio, write_manifest, tmp_path):
    write_audio("one/a.wav", seconds=0.2)
    write_audio("one/b.wav", seconds=0.3)
    single = write_audio("c.flac", seconds=0.4)
    manifest = write_manifest([{"path": "c.flac", "duration": 0.1}])
    corpus, _ = opened([tmp_path / "one", single, manifest], weights=[1, 2.5, 0])
    assert corpus.durations_samples.tolist() == [3_200, 4_800, 6_400, 1_600]
    assert corpus.weights.tolist() == [1, 1, 2.5, 0]
    assert [corpus.entry(i)["id"] for i in range(4)] == ["a", "b", "c", "c"]
    assert [len(corpus.read(i)) for i in range(4)] == corpus.durations_samples.tolist()
    into = np.full(300, np.nan, np.float32)
    corpus.read_into(1, 4_000, into)
    np.testing.assert_array_equal(into, corpus.read(1)[4_000:4_300])
    part = corpus.select([2, 0]).select(np.array([False, True]))
    assert part.entry(0)["id"] == "a"
    assert part.locate(0) == corpus.locate(0)
    assert corpus.select([2, 0]).weights.tolist() == [2.5, 1]
    with pytest.raises(IndexError):
        corpus.select([4])
    one, _ = opened(single, weights=[2])
    assert one.weights.tolist() == [2]


def test_what_cannot_be_opened_says_so(write_audio, write_manifest, tmp_path):
    write_audio("a.wav")
    (tmp_path / "none").mkdir()
    bad = write_manifest(["{"], "bad.jsonl")
    empty = write_manifest([], "empty.jsonl")
    for sources, options, words in [
        ([], {}, "at least one"),
        (tmp_path / "absent", {}, "no such file"),
        (tmp_path / "none", {}, "folder .* holds no usable audio"),
        (bad, {}, "manifest .* holds no usable audio: 1 rejected"),
        (empty, {}, "holds no usable audio"),
        ([tmp_path / "a.wav"], {"weights": [1, 2]}, "weights: one per source"),
        ([tmp_path / "a.wav"], {"weights": [-1]}, "weights: 0 or more"),
        ([tmp_path / "a.wav"], {"weights": [0]}, "weights: one above 0"),
        ([tmp_path / "a.wav", ""], {}, "sources: an empty path"),
        ([tmp_path / "a.wav"], {"weights": [float("nan")]}, "weights: 0 or more"),
    ]:
        with pytest.raises(InputError, match=words):
            opened(sources, **options)


def test_fingerprint_is_of_the_list_not_of_its_place(write_audio, write_manifest, tmp_path):
    prints = []
    for place in ("x", "y/z"):
        write_audio(f"{place}/a.wav", seconds=0.2)
        path = write_manifest(
            [{"path": "a.wav"}, {"path": "a.wav", "offset": 0.1}], f"{place}/s.jsonl"
        )
        manifest, folder = opened(path)[0], opened(tmp_path / place)[0]
        prints.append((manifest.fingerprint, folder.fingerprint, manifest.select([0]).fingerprint))
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 3
    write_audio("x/a.wav", seconds=0.3)
    assert opened(tmp_path / "x")[0].fingerprint != prints[0][1]
    assert opened(path)[0].fingerprint == prints[0][0]
    assert opened([path, path])[0].fingerprint != prints[0][0]


def test_corpora_pickle(write_audio, write_manifest, tmp_path):
    write_audio("in/a.wav", seconds=0.2)
    path = write_manifest([{"path": "in/a.wav"}])
    corpus, _ = opened([path, tmp_path / "in"], weights=[1, 2])
    corpus.read(0)  # maps the manifest
    copy = pickle.loads(pickle.dumps(corpus.select([1, 0])))
    np.testing.assert_array_equal(copy.read(1), corpus.read(0))
    assert copy.fingerprint == corpus.select([1, 0]).fingerprint


def test_manifest_changed_under_way(write_audio, write_manifest):
    write_audio("a.wav")
    path = write_manifest([{"path": "a.wav"}])
    corpus, _ = opened(path)
    path.write_text('{"path": "other.wav"}\n')
    with pytest.raises(InputError, match="has changed"):
        corpus.read(0)


def test_a_long_manifest_costs_a_few_bytes_a_line(write_manifest):
    lines = [
        f'{{"path": "audio/{i:07d}.flac", "duration": 3.5, "text": "some words"}}'
        for i in range(20_000)
    ]
    path = write_manifest(lines)
    log = RejectLog()
    tracemalloc.start()
    corpus = ManifestCorpus(path, log)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == 20_000
    assert held < 40 * len(corpus)
    assert peak < 20e6  # a chunk of parsed lines
    assert corpus.entry(19_999)["id"] == "audio/0019999"


def test_validate_with_workers_finds_the_same(speech_like, tmp_path):
    for name in ("03.wav", "17.wav"):
        path = speech_like / name
        path.write_bytes(path.read_bytes().replace(b"data", b"dada", 1))
    corpus, log = opened(speech_like)
    assert len(corpus) == 22
    (speech_like / "05.wav").unlink()
    results = []
    for workers in (0, 2):
        log, steps = RejectLog(), []
        good = validate_corpus(corpus, log, workers, lambda *done, steps=steps: steps.append(done))
        results.append((good.fingerprint, log.summary()))
        assert steps[-1] == (22, 22)
        assert len(steps) == 22
    assert results[0] == results[1]
    assert results[0][1] == "1 rejected (1 missing)"


def test_real_speech(shared):
    corpus, log = opened([shared / "speech" / "arctic.jsonl", shared / "speech" / "digits.jsonl"])
    assert log.count == 0
    assert len(corpus) == 389 + 1_500
    assert corpus.total_s == pytest.approx(18.8 * 60 + 10.9 * 60, rel=0.01)
    good = validate_corpus(corpus.select(np.arange(0, len(corpus), 10)), log)
    assert len(good) == 189
    assert log.count == 0


@pytest.mark.parametrize(
    "phones",
    [
        "abc",
        ["123"],
        [[0, 1]],
        [[1, 0, "a"]],
        [[0, 1, "a"], [1, 2]],
        [[0, 1, None]],
        [[0, 1, ""]],
        [[0, 1, ["a"]]],
        [[0, float("nan"), "a"]],
        [[0, 10**400, "a"]],
        {"a": 1},
        3,
    ],
)
def test_malformed_phones_are_counted(phones):
    assert phone_segments({"phones": phones}) is None
    entries = [{"phones": phones}, {"phones": [[0, 1, "a"], [1, 1.5, 7]]}, {"phones": []}, {}]
    assert bad_phones(entries).startswith("phones of 1 utterance are not [start_s, end_s, symbol]")
    assert bad_phones(entries[1:]) is None
