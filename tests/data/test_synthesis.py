"""The demo corpus: labels that fit the sound, one seed one corpus, nothing half-made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gmm_jepa import locks
from gmm_jepa.data.commands import MOODS, commands, spoken
from gmm_jepa.data.espeak import Speaker
from gmm_jepa.data.phones import SILENCE, label_phones, phone_symbol
from gmm_jepa.data.synthesis import synthesize
from gmm_jepa.data.voices import N_VOICES, cast_parts, sentences
from gmm_jepa.errors import InputError
from gmm_jepa.files import UNFINISHED

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")
pytest.importorskip("espeakng_loader")

SMALL = {"minutes": 0.6, "test_minutes": 0.2, "n_train_voices": 3, "n_test_voices": 2, "seed": 5}
"""Enough for every voice to read a few sentences; half a second to make."""


def read_manifest(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_samples(folder: Path, entry: dict) -> np.ndarray:
    samples, rate_hz = soundfile.read(folder / entry["audio_filepath"], dtype="float32")
    assert rate_hz == 16000
    assert samples.ndim == 1
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "speech"
    assert synthesize(folder, **SMALL) == (folder / "train.jsonl", folder / "test.jsonl")
    return folder


@pytest.fixture(scope="module")
def entries(corpus: Path) -> list[dict]:
    return read_manifest(corpus / "train.jsonl") + read_manifest(corpus / "test.jsonl")


def test_manifests_describe_the_audio(corpus: Path, entries: list[dict]) -> None:
    audio = {path.name for path in (corpus / "audio").iterdir()}
    assert audio == {Path(entry["audio_filepath"]).name for entry in entries}
    assert len(audio) == len(entries)
    for entry in entries:
        assert entry["duration"] == len(read_samples(corpus, entry)) / 16000
        assert entry["text"] in sentences()


def test_each_part_has_the_minutes_asked_for(corpus: Path) -> None:
    for name, minutes in (("train", SMALL["minutes"]), ("test", SMALL["test_minutes"])):
        part = read_manifest(corpus / f"{name}.jsonl")
        made_s = sum(entry["duration"] for entry in part)
        overrun_s = len({entry["speaker"] for entry in part}) * max(e["duration"] for e in part)
        assert 60 * minutes <= made_s < 60 * minutes + overrun_s


def test_test_part_is_new_voices_and_new_sentences(corpus: Path) -> None:
    train, test = (read_manifest(corpus / f"{name}.jsonl") for name in ("train", "test"))
    for key, n_train, n_test in (("speaker", 3, 2), ("text", 1, 1)):
        heard, unheard = ({entry[key] for entry in part} for part in (train, test))
        assert len(heard) >= n_train
        assert len(unheard) >= n_test
        assert not heard & unheard


def test_phones_cover_each_utterance_in_order(entries: list[dict]) -> None:
    for entry in entries:
        starts, ends, symbols = zip(*entry["phones"], strict=True)
        assert starts[0] == 0.0
        assert ends[-1] == entry["duration"]
        assert starts[1:] == ends[:-1]
        assert all(start < end for start, end in zip(starts, ends, strict=True))
        assert all(symbols)


def test_silence_is_where_the_energy_is_low(corpus: Path, entries: list[dict]) -> None:
    levels: dict[bool, list[float]] = {True: [], False: []}
    for entry in entries:
        samples = read_samples(corpus, entry)
        for start_s, end_s, symbol in entry["phones"]:
            # A millisecond off each side: the resampling filter spreads sound over the edge.
            inner = samples[round(16000 * start_s) + 16 : round(16000 * end_s) - 16]
            if len(inner) > 160:
                levels[symbol == SILENCE].append(float(np.sqrt(np.mean(inner**2))))
    assert len(levels[True]) >= 5
    assert max(levels[True]) < 1e-3
    assert np.percentile(levels[False], 2) > 2e-3


def test_levels_are_natural_and_nothing_clips(corpus: Path, entries: list[dict]) -> None:
    waves = [read_samples(corpus, entry) for entry in entries]
    rms = np.array([np.sqrt(np.mean(wave**2)) for wave in waves])
    assert rms.min() > 0.05
    assert rms.max() < 0.12
    assert rms.std() > 0.002
    assert max(np.abs(wave).max() for wave in waves) < 0.96


def test_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(corpus)


def test_other_seed_other_corpus(corpus: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "other", **{**SMALL, "seed": 6})
    assert read_manifest(tmp_path / "other" / "train.jsonl") != read_manifest(
        corpus / "train.jsonl"
    )


def test_a_complete_corpus_is_reused_untouched(corpus: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert synthesize(corpus, **SMALL) == (corpus / "train.jsonl", corpus / "test.jsonl")
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == times


def test_a_corpus_made_otherwise_is_refused(corpus: Path) -> None:
    with pytest.raises(InputError, match=r"'minutes': 0\.6.*'minutes': 0\.7"):
        synthesize(corpus, **{**SMALL, "minutes": 0.7})


@pytest.mark.parametrize("marker", [None, "{", "[]", "{}"])
def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    if marker is not None:
        (tmp_path / "corpus.json").write_text(marker)
    with pytest.raises(InputError, match="something else in it"):
        synthesize(tmp_path, **SMALL)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(made_s: float, wanted_s: float) -> None:
        assert 0 < made_s < wanted_s
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "speech", **SMALL, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"c{UNFINISHED}"
    (left / "audio").mkdir(parents=True)
    synthesize(tmp_path / "c", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_another_process_fills_is_refused(tmp_path: Path) -> None:
    with locks.held(tmp_path / "c"), pytest.raises(InputError, match="another process works here"):
        synthesize(tmp_path / "c", **SMALL)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    tiny = {"minutes": 0.05, "test_minutes": 0.05, "n_train_voices": 1, "n_test_voices": 1}
    (tmp_path / "empty").mkdir()  # an empty folder is as good as none
    synthesize(tmp_path / "empty", **tiny, progress=lambda *amount: seen.append(amount))
    made_s = [made for made, _ in seen]
    assert made_s == sorted(made_s)
    assert made_s[-1] >= seen[-1][1] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"minutes": 0}, InputError, "minutes: expected a positive number, got 0"),
        ({"test_minutes": float("nan")}, InputError, "test_minutes: .* got nan"),
        ({"minutes": "ten"}, TypeError, "minutes: expected a number, got str"),
        ({"n_train_voices": 0}, InputError, "n_train_voices: expected 1 or more, got 0"),
        ({"n_test_voices": 2.0}, TypeError, "n_test_voices: expected an integer, got float"),
        ({"n_train_voices": N_VOICES}, InputError, f"at most {N_VOICES}"),
        ({"seed": -1}, InputError, "seed: expected 0 or more, got -1"),
    ],
)
def test_senseless_arguments_are_refused(
    tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        synthesize(tmp_path / "speech", **{**SMALL, **change})
    assert not (tmp_path / "speech").exists()


def test_inventory_is_that_of_english() -> None:
    """What the labels of a large corpus consist of, in all accents."""
    symbols = set()
    for accent in ("en-us", "en", "en-gb-x-rp"):
        with Speaker() as speaker:
            for text in sentences()[::5]:
                speech = speaker.say(text, voice=f"{accent}+m3", rate=400)
                labels = label_phones(speech.phones, np.asarray(speech.samples))
                symbols.update(symbol for _, _, symbol in labels)
    assert 40 <= len(symbols) <= 50, sorted(symbols)
    assert {SILENCE, "ə", "s", "tʃ", "aɪ", "ŋ", "ʒ"} <= symbols


def test_every_voice_speaks_and_sounds_different() -> None:
    train, test = cast_parts(N_VOICES - 1, 1, seed=0, texts=sentences())
    names = [voice.name for voice in train.voices + test.voices]
    assert len(set(names)) == N_VOICES
    heard = set()
    for name in names:
        with Speaker() as speaker:
            heard.add(bytes(speaker.say("A loud hello.", voice=name).samples))
    assert len(heard) == N_VOICES


def test_sentences_are_many_and_short() -> None:
    texts = sentences()
    assert len(texts) >= 400
    assert len({text.lower() for text in texts}) == len(texts)
    assert all(4 <= len(text.split()) <= 14 for text in texts)
    assert all(text.isascii() and text[-1] in ".?!" for text in texts)


def test_unknown_voice_is_an_error_and_not_another_voice() -> None:
    with Speaker() as speaker, pytest.raises(RuntimeError, match="no voice 'xx'"):
        speaker.say("Hello.", voice="xx")


@pytest.mark.parametrize(
    ("name", "symbol"),
    [("ˈiː", "i"), ("ˌɔːɹ", "ɔɹ"), ("n̩", "n"), ("tʃ", "tʃ"), ("əʊ", "oʊ"), ("ˈa:", "æ")],
)
def test_stress_and_length_are_folded(name: str, symbol: str) -> None:
    assert phone_symbol(name) == symbol


def test_a_closure_belongs_to_its_stop() -> None:
    samples = np.array([0, 0, 9, 9, 9, 0, 0, 9, 9, 0])
    onsets = [(2, "a"), (7, "k")]
    assert label_phones(onsets, samples) == [(0, 2, SILENCE), (2, 5, "æ"), (5, 10, "k")]


def test_nameless_events_are_pauses_or_part_of_the_phone_before() -> None:
    samples = np.array([9, 9, 9, 9, 0, 0, 0, 9])
    glide_then_pause = [(0, "i"), (2, ""), (4, ""), (5, ""), (7, "s")]
    assert label_phones(glide_then_pause, samples) == [(0, 4, "i"), (4, 7, SILENCE), (7, 8, "s")]


def test_phones_without_samples_are_left_out() -> None:
    samples = np.full(6, 9)
    assert label_phones([(0, "ɛ"), (3, "l"), (3, "z")], samples) == [(0, 3, "ɛ"), (3, 6, "z")]
    assert label_phones([], np.zeros(0, dtype=np.int16)) == []


def test_commands_have_slots_moods_and_what_is_said(tmp_path: Path) -> None:
    train, test = synthesize(
        tmp_path / "commands", minutes=0.5, test_minutes=0.2, n_train_voices=2, n_test_voices=1,
        content="commands",
    )  # fmt: skip
    lines = [json.loads(line) for path in (train, test) for line in path.read_text().splitlines()]
    assert {line["label"] for line in lines} == set(MOODS)
    for line in lines:
        kinds = re.findall(r"B-(\w+)", line["text"])
        assert kinds == re.findall(r"E-(\w+)", line["text"])
        assert kinds
        words = [word for word in line["text"].split() if not re.match(r"[BE]-", word)]
        assert line["transcript"].split() == words


def test_commands_are_many_and_each_is_there_once() -> None:
    written = commands()
    assert len(written) == len(set(written)) > 250
    assert spoken("make the B-device lamp E-device B-colour red E-colour") == "make the lamp red"
