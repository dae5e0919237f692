import dataclasses
import json

import numpy as np
import pytest
import soundfile

from gmm_jepa.cli import main
from gmm_jepa.config import Sources
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.frames import LogMelStream
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.data.split import hold_out
from gmm_jepa.data.windows import draw_utterances
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec, log_mel_frames
from gmm_jepa.pipeline import open_run
from gmm_jepa.presets import PRESETS
from tests.audio import write_corpus


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def corpus(manifest):
    return open_corpus(manifest, rejects=RejectLog(None))


def split(corpus, by="auto", fraction=0.2, seed=0):
    return hold_out(corpus, fraction=fraction, by=by, seed=seed)


def test_four_speakers_are_held_out_whole(corpus):
    kept, heldout = split(corpus)
    speakers = [{corpus.entry(int(i))["speaker"] for i in part} for part in (kept, heldout)]
    assert not speakers[0] & speakers[1]
    assert len(speakers[1]) == 1
    assert sorted([*kept, *heldout]) == list(range(len(corpus)))


def test_utterances_are_held_out_where_asked(corpus):
    kept, heldout = split(corpus, by="utterance")
    assert len({corpus.entry(int(i))["speaker"] for i in heldout}) > 1
    share = corpus.durations_samples[heldout].sum() / corpus.durations_samples.sum()
    assert 0.2 <= share < 0.35
    assert len(kept) + len(heldout) == len(corpus)


def test_the_split_depends_on_the_seed_alone(corpus):
    np.testing.assert_array_equal(split(corpus)[1], split(corpus)[1])
    choices = {tuple(split(corpus, by="utterance", seed=seed)[1]) for seed in range(5)}
    assert len(choices) > 1


@pytest.mark.parametrize("fraction", [1e-6, 1 - 1e-9])
def test_both_parts_hold_something(corpus, fraction):
    kept, heldout = split(corpus, by="utterance", fraction=fraction)
    assert len(kept) >= 1
    assert len(heldout) >= 1


def test_one_utterance_cannot_be_split(corpus):
    with pytest.raises(InputError, match="two usable utterances"):
        split(corpus.select([0]))
    with pytest.raises(InputError, match="two speakers"):
        split(corpus.select([0, 4, 8]), by="speaker")


def test_frames_are_every_frame_once_and_the_same_again(corpus):
    spec = LogMelSpec()
    stream = LogMelStream(corpus, spec, rejects=RejectLog(None))
    first, again = list(stream), list(stream)
    expected = sum(log_mel_frames(int(n), spec) for n in corpus.durations_samples)
    assert sum(map(len, first)) == expected
    assert all((a == b).all() for a, b in zip(first, again))


def test_a_part_of_the_frames_is_drawn_evenly(corpus):
    durations = corpus.durations_samples
    chosen = draw_utterances(durations, durations.sum() / 3, seed=0)
    assert durations[chosen].sum() <= durations.sum() / 3
    assert chosen[0] > 0 or chosen[-1] < len(corpus) - 1
    assert (np.diff(chosen) > 0).all()
    assert len(draw_utterances(durations, 1, seed=0)) == 1


def test_silence_is_refused_as_a_target(tmp_path, capsys):
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", np.zeros(16_000, np.float32), 16_000)
    words = ["run", "--audio", str(folder), "--out", str(tmp_path / "run"), "--preset", "smoke"]
    assert main(words) == 2
    assert "is the audio silent?" in capsys.readouterr().err
    assert not (tmp_path / "run" / "gmm.safetensors").exists()


def test_audio_that_changed_since_the_run_began_is_refused(tmp_path):
    manifest = write_corpus(tmp_path / "audio", 6)
    sources = Sources(audio=(str(manifest),))
    with processes() as peers:
        open_run(tmp_path / "run", sources, PRESETS["smoke"](), peers).audio()
        lines = manifest.read_text().splitlines()
        manifest.write_text("\n".join(lines[:-1]) + "\n")
        with pytest.raises(InputError, match="changed since this run began"):
            open_run(tmp_path / "run", sources, PRESETS["smoke"](), peers).audio()
        options = {"audio_may_differ": True}
        audio = open_run(tmp_path / "run", sources, PRESETS["smoke"](), peers, **options).audio()
        assert len(audio.train) + len(audio.heldout) == 5  # nothing was made of it yet
        (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
        manifest.write_text("\n".join(lines[:-2]) + "\n")
        with pytest.raises(InputError, match="changed since this run began"):
            open_run(tmp_path / "run", sources, PRESETS["smoke"](), peers, **options).audio()


def test_a_run_goes_on_where_its_audio_moved(tmp_path):
    manifest = write_corpus(tmp_path / "audio", 6)
    other = write_corpus(tmp_path / "other", 5)
    recipe, root = PRESETS["smoke"](), tmp_path / "run"
    with processes() as peers:
        before = open_run(root, Sources(audio=(str(manifest),)), recipe, peers).audio()
        (root / "checkpoints" / "step_00000001").mkdir(parents=True)
        (tmp_path / "audio").rename(tmp_path / "moved")
        elsewhere = Sources(audio=(str(other),))
        run = open_run(root, elsewhere, recipe, peers, audio_may_differ=True)
        with pytest.raises(InputError, match="changed since this run began"):
            run.audio()
        moved = Sources(audio=(str(tmp_path / "moved" / manifest.name),))
        with pytest.raises(InputError, match="other settings"):
            open_run(root, moved, recipe, peers)
        run = open_run(root, moved, recipe, peers, audio_may_differ=True)
        assert run.folder.read()[0].audio == (str(manifest),)
        after = run.audio()
        assert run.folder.read() == (moved, recipe)
        assert before.train.fingerprint == after.train.fingerprint
        assert len(after.train.read(0)) == before.train.durations_samples[0]
        more = dataclasses.replace(moved, audio=(*moved.audio, str(other)))
        for wrong in (more, dataclasses.replace(moved, heldout_audio=(str(other),))):
            with pytest.raises(InputError, match="other settings"):
                open_run(root, wrong, recipe, peers, audio_may_differ=True)


def test_held_out_audio_that_is_trained_on_is_told_of(tmp_path, capsys):
    manifest = str(write_corpus(tmp_path / "audio", 6))
    with processes() as peers:
        open_run(tmp_path / "a", Sources(audio=(manifest,)), PRESETS["smoke"](), peers).audio()
        assert "warning" not in capsys.readouterr().out
        both = Sources(audio=(manifest,), heldout_audio=(manifest,))
        open_run(tmp_path / "b", both, PRESETS["smoke"](), peers).audio()
    assert (
        "warning: 6 held-out utterances are in the training audio, too" in capsys.readouterr().out
    )


def test_what_a_failing_fit_could_not_read_is_recorded(tmp_path):
    manifest = write_corpus(tmp_path / "audio", 6)
    sources = Sources(audio=(str(manifest),))
    with processes() as peers:
        run = open_run(tmp_path / "run", sources, PRESETS["smoke"](), peers)
        audio = run.audio()
        for path in (tmp_path / "audio").glob("*.flac"):
            path.unlink()
        with pytest.raises(InputError, match="none of it can be read"):
            run.targets(audio.train)
    rejected = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert len(rejected) == len(audio.train)


def test_a_resumed_run_leaves_out_what_was_unreadable_before(tmp_path):
    manifest = write_corpus(tmp_path / "audio", 6)
    nan = np.full(16_000, np.nan, np.float32)
    soundfile.write(tmp_path / "audio" / "nan.wav", nan, 16_000, subtype="FLOAT")
    with manifest.open("a") as file:
        file.write(json.dumps({"audio_filepath": "nan.wav", "speaker": "s9"}) + "\n")
    recipe = PRESETS["smoke"]()
    object.__setattr__(recipe.data, "max_bad_fraction", 0.5)
    sources = Sources(audio=(str(manifest),))
    with processes() as peers:
        sizes = []
        for _ in range(2):
            audio = open_run(tmp_path / "run", sources, recipe, peers).audio()
            sizes.append((len(audio.train), len(audio.heldout)))
    assert sizes[0] == sizes[1]
    assert sum(sizes[0]) == 6
