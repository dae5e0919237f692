"""The model card of `gmm-jepa export --hf` tells of the weights that were exported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gmm_jepa.cli import main
from tests.audio import write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    manifest = write_corpus(folder / "audio", 12)
    words = ["run", "--audio", str(manifest), "--out", str(folder / "run"), "--preset", "smoke"]
    words += ["--system", "pure-jepa", "--train.steps", "4", "--data.workers", "0"]
    assert main(words) == 0
    return folder / "run"


def card_of(run: Path, out: Path, *more: str) -> str:
    assert main(["export", "--source", str(run), "--hf", str(out), *more]) == 0
    return (out / "README.md").read_text()


def test_of_the_encoder_that_was_evaluated(run, tmp_path):
    card = card_of(run, tmp_path / "hf")
    assert "System pure-jepa, 4 of 4 steps" in card
    assert "gmm-jepa run" not in card
    assert "teacher" not in card
    assert "| text | " in card
    assert "from the training corpus" in card


def test_of_a_teacher(run, tmp_path):
    card = card_of(run, tmp_path / "hf", "--teacher")
    assert "the weights of the teacher" in card
    assert "accuracy" not in card
    assert "These weights were not evaluated." in card


def test_of_another_checkpoint_than_was_evaluated(run, tmp_path):
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000004").rename(checkpoints / "step_00000003")
    card = card_of(run, tmp_path / "hf")
    assert "3 of 4 steps" in card
    assert "accuracy" not in card
    assert "These weights were not evaluated." in card


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_a_missing_package_is_told_of_before_anything_is_traced(
    module, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("gmm_jepa.cli.export.load_encoder", lambda *_args, **_kwargs: 1 / 0)
    words = ["export", "--source", str(run), "--hf", str(tmp_path / "hf")]
    assert main([*words, "--onnx", str(tmp_path / "a.onnx")]) == 1
    assert f"{module} is needed here: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
