"""Every system from audio to checkpoint by its one flag, and exactly on from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gmm_jepa.cli import main
from gmm_jepa.gmm import GaussianMixture, KMeans
from gmm_jepa.presets import SYSTEMS
from gmm_jepa.report import theme
from gmm_jepa.train.metrics import read_metrics
from tests.audio import write_corpus

SMALL = ["--preset", "smoke", "--train.no-tensorboard", "--mixture.n-components", "8"]
SMALL += ["--train.steps", "12", "--train.log-every", "2", "--train.checkpoint-every", "3"]
SMALL += ["--train.keep-checkpoints", "9", "--mixture.max-iter", "3"]
SECOND = "gmm_2.safetensors"
TIMED = ("audio_s_per_s", "wait_share")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 12)


def train(manifest: Path, out: Path, *more: str, command: str = "train") -> list[dict]:
    assert main([command, "--audio", str(manifest), "--out", str(out), *SMALL, *more]) == 0
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def drop_after(run: Path, step: int) -> None:
    """Take back what a run did after a step."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_resumes_to_the_same_lines(system, manifest, tmp_path):
    """Step 3 lies before the online mixture and in the first iteration, step 9 behind them."""
    more = ("--system", system, "--encoder.dropout", "0.1")
    if system == "online-gmm":
        more += ("--objective.online-start", "0.6", "--objective.online-seeding", "0.5")
    whole = train(manifest, tmp_path / "run", *more)
    assert [line["step"] for line in whole] == [2, 4, 6, 8, 10, 12]
    for step in (9, 3):
        drop_after(tmp_path / "run", step)
        assert train(manifest, tmp_path / "run", *more) == whole


def test_labels_of_an_iteration_are_made_once_and_again_if_they_are_gone(manifest, tmp_path):
    run = tmp_path / "run"
    more = ("--system", "hubert-style", "--objective.iterations", "3")
    whole = train(manifest, run, *more)
    kinds = ["kmeans.safetensors", "labels_2/kmeans.safetensors", "labels_3/kmeans.safetensors"]
    assert sorted(json.loads((run / "labels.json").read_text())) == kinds
    written = [KMeans.load(run / kind).cluster_centers_ for kind in kinds]
    made_at = (run / kinds[1]).stat().st_mtime_ns
    shutil.rmtree(run / "labels_3")
    drop_after(run, 8)
    assert train(manifest, run, *more) == whole
    for kind, before in zip(kinds, written):
        np.testing.assert_array_equal(KMeans.load(run / kind).cluster_centers_, before)
    assert (run / kinds[1]).stat().st_mtime_ns == made_at


def test_labels_are_never_made_of_another_step_than_their_own(manifest, tmp_path, capsys):
    run, more = tmp_path / "run", ("--system", "hubert-style")
    train(manifest, run, *more)
    shutil.rmtree(run / "labels_2")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    drop_after(run, 9)
    assert main(["train", "--audio", str(manifest), "--out", str(run), *SMALL, *more]) == 2
    assert "no checkpoint of step 6" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_with_the_labels_that_it_learned(manifest, tmp_path, monkeypatch):
    """At the end of an iteration, too, where the next one's are not made yet."""
    monkeypatch.setattr(theme, "DPI", 20)
    run = tmp_path / "run"
    train(manifest, run, "--system", "hubert-style")
    drop_after(run, 6)
    shutil.rmtree(run / "labels_2")
    assert main(["evaluate", "--run", str(run)]) == 0
    assert not (run / "labels_2").exists()
    assert json.loads((run / "evaluation.json").read_text())["clusters"]


def test_iterations_may_learn_a_mixture_of_a_layer(manifest, tmp_path):
    more = ("--system", "hubert-style", "--objective.labels", "mixture")
    lines = train(manifest, tmp_path / "run", *more, "--objective.targets", "soft")
    assert (tmp_path / "run" / "labels_2" / "gmm.safetensors").exists()
    assert all(line["kl"] > 0 for line in lines)


def test_an_ensemble_trains_on_mixtures_that_differ(manifest, tmp_path):
    run = tmp_path / "run"
    lines = train(manifest, run, "--objective.ensemble", "1", "2")
    both = [GaussianMixture.load(run / name).means_ for name in ("gmm.safetensors", SECOND)]
    assert not np.allclose(*both)
    assert np.abs(both[0] - both[1]).mean() < np.abs(both[0] - both[1][::-1]).mean()
    assert all(line["kl"] > 0 for line in lines)


@pytest.mark.parametrize("system", ["pure-jepa", "online-gmm"])
def test_a_system_is_evaluated(system, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(theme, "DPI", 20)
    run = tmp_path / "run"
    train(manifest, run, "--system", system, command="run")
    numbers = json.loads((run / "evaluation.json").read_text())
    assert ("clusters" in numbers) == (system != "pure-jepa")
    assert ("mixture" in numbers) == (system == "online-gmm")
    assert numbers["probes"]


def test_a_transformer_trains(manifest, tmp_path):
    small = ("--model", "transformer-cpu", "--encoder.layers", "1", "--encoder.conv-dim", "8")
    lines = train(manifest, tmp_path / "run", *small, "--encoder.code-dim", "32")
    assert lines[-1]["kl"] < lines[0]["kl"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["encoder"]["kind"] == "transformer"
