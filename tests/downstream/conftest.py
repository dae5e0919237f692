"""A tiny encoder and tiny corpora for downstream tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gmm_jepa.model_file import save_model
from gmm_jepa.models import JepaModel
from tests.audio import write_corpus
from tests.models.small import SMALL

TEXTS = {
    "asr": ["one two", "Three", "it's"],
    "sf": [
        "set the B-device lamp E-device",
        "B-colour red E-colour on",
        "B-device fan E-device B-colour blue E-colour",
    ],
    "er": ["neu", "ang", "sad"],
}


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    save_model(path, JepaModel(SMALL, 8))
    return path


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("audio"), 12, seconds=(0.5, 0.9))


@pytest.fixture
def manifest_of(audio, tmp_path):
    """Writes a manifest of `n` utterances for a task, `change` applied to its lines."""

    def write(task: str, n: int = 12, name: str = "lines", change=None, *, first=0) -> Path:
        lines = [json.loads(line) for line in audio.read_text().splitlines()[first : first + n]]
        for i, line in enumerate(lines):
            line["audio_filepath"] = str(audio.parent / line["audio_filepath"])
            line["label" if task == "er" else "text"] = TEXTS[task][i % 3]
            if change is not None:
                change(i, line)
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write
