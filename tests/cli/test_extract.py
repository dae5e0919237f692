"""`gmm-jepa extract`: which runs and which audio it takes, and what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gmm_jepa.cli import extract as extract_module
from gmm_jepa.cli import main
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.trained import newest
from tests.audio import write_corpus

SMALL = ["--preset", "smoke", "--train.steps", "4", "--data.workers", "0"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 12)


@pytest.fixture(scope="module")
def run_of(manifest, tmp_path_factory):
    """Trains a system for a few steps."""

    def train(system: str, *more: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / system
        words = ["train", "--audio", str(manifest), "--out", str(out), "--system", system]
        assert main([*words, *SMALL, *more]) == 0
        return out

    return train


@pytest.fixture(scope="module")
def headless(run_of) -> Path:
    return run_of("pure-jepa")


def extract(run: Path, audio: Path, out: Path, *more: str) -> int:
    return main(["extract", "--run", str(run), "--audio", str(audio), "--out", str(out), *more])


def test_posteriors_of_a_head_on_the_predictor(run_of, manifest, tmp_path):
    run = run_of("online-gmm", "--mixture.n-components", "8")
    assert extract(run, manifest, tmp_path / "out", "--clusters") == 0
    folder = RunFolder(run)
    _, recipe = folder.read()
    assert recipe.objective.head_input == "predictor"
    model = newest(folder, recipe).model()
    for entry in json.loads((tmp_path / "out" / "index.json").read_text())["utterances"][:3]:
        arrays = np.load(tmp_path / "out" / entry["features"])
        with torch.no_grad():
            heard = model.predict(torch.from_numpy(arrays["output"])[None], None)
            expected = model.cluster_head(heard)[0].softmax(-1)
        np.testing.assert_allclose(arrays["clusters"], expected, atol=1e-5)


def test_a_run_without_a_head_has_no_clusters(headless, manifest, tmp_path, capsys):
    assert extract(headless, manifest, tmp_path / "out", "--clusters") == 2
    assert "clusters: this run has no cluster head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def broken(manifest: Path, folder: Path, n_good: int) -> Path:
    """A manifest of `n_good` utterances and one that is cut off."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()[:n_good]]
    for line in lines:
        line["audio_filepath"] = str(manifest.parent / line["audio_filepath"])
    (folder / "cut.flac").write_bytes((manifest.parent / "u000.flac").read_bytes()[:3000])
    lines.insert(0, {"audio_filepath": "cut.flac", "duration": 0.5})
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_nothing_readable_leaves_no_index_and_can_be_tried_again(
    headless, manifest, tmp_path, capsys
):
    bad, out = broken(manifest, tmp_path, 0), tmp_path / "out"
    assert extract(headless, bad, out, "--max-bad-fraction", "1") == 2
    assert "none of 1 utterances could be read" in capsys.readouterr().err
    assert not (out / "index.json").exists()
    assert extract(headless, manifest, out) == 0


def test_too_much_unreadable_audio_stops_it(headless, manifest, tmp_path, capsys):
    bad, out = broken(manifest, tmp_path, 3), tmp_path / "out"
    assert extract(headless, bad, out) == 2
    assert "1 of 4 inputs are bad" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["rejects.jsonl"]
    assert extract(headless, bad, out, "--max-bad-fraction", "0.5") == 0
    assert len(json.loads((out / "index.json").read_text())["utterances"]) == 3


def test_several_processes_are_refused(headless, manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert extract(headless, manifest, tmp_path / "out") == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_run(headless, manifest, tmp_path, capsys):
    (checkpoint,) = (headless / "checkpoints").iterdir()
    assert extract(headless, manifest, tmp_path / "run") == 0
    assert extract(checkpoint, manifest, tmp_path / "checkpoint") == 0
    for path in (tmp_path / "run").glob("*.npz"):
        found = np.load(tmp_path / "checkpoint" / path.name)
        np.testing.assert_array_equal(np.load(path)["output"], found["output"])
    copied = tmp_path / "elsewhere" / "step_00000004"
    shutil.copytree(checkpoint, copied)
    assert extract(copied, manifest, tmp_path / "out") == 2
    assert "expected a run folder or one of its checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
def test_a_start_that_fails_leaves_no_features(headless, manifest, tmp_path, failure, monkeypatch):
    out = tmp_path / "out"
    n_written = 0

    def fail(path, arrays, write=extract_module._write):
        nonlocal n_written
        n_written += 1
        assert (out / "unfinished").exists()
        if n_written > 3:
            raise failure
        write(path, arrays)

    monkeypatch.setattr(extract_module, "_write", fail)
    assert extract(headless, manifest, out) == (130 if failure is KeyboardInterrupt else 1)
    assert n_written == 4
    assert not out.exists()


def test_what_a_killed_start_left_is_not_mixed_in(headless, manifest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (
        "unfinished",
        "0000000_other.npz",
        "0000099_b.safetensors",
        "0000003_x.npz.gmm-jepa-part",
    ):
        (out / name).touch()
    assert extract(headless, manifest, out) == 0
    index = json.loads((out / "index.json").read_text())
    named = {entry["features"] for entry in index["utterances"]}
    assert {path.name for path in out.iterdir()} == named | {"index.json"}


@pytest.mark.parametrize("names", [["0000000_a.npz"], ["notes.txt"], ["unfinished", "notes.txt"]])
def test_a_folder_with_something_else_is_refused(headless, manifest, tmp_path, names, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).touch()
    assert extract(headless, manifest, out) == 2
    assert f"holds no features ({names[-1]}, ...): give another folder" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted(names)


def test_an_error_after_the_index_loses_no_features(headless, manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(RejectLog, "summary", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract(headless, manifest, out)
    index = json.loads((out / "index.json").read_text())
    assert all((out / entry["features"]).exists() for entry in index["utterances"])
    assert not (out / "unfinished").exists()
