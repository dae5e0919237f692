"""Frames to fit on: drawn from a known mixture, and log-mel of real speech."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gmm_jepa.features import log_mel

MEANS = np.array([[0.0, 0.0, 5.0], [8.0, -3.0, 0.0], [-6.0, 4.0, 1.0]])
DEVIATIONS = np.array([[1.0, 0.5, 1.5], [0.7, 2.0, 1.0], [1.2, 1.0, 0.6]])
WEIGHTS = np.array([0.5, 0.3, 0.2])


@pytest.fixture
def blobs() -> np.ndarray:
    """(3000, 3) float64: three Gaussians far apart, in the shares 0.5, 0.3, 0.2."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), (3000 * WEIGHTS).astype(int))
    random.shuffle(labels)
    return MEANS[labels] + DEVIATIONS[labels] * random.standard_normal((3000, 3))


@pytest.fixture(scope="session")
def speech(shared) -> np.ndarray:
    """(N, 80) float32 log-mel of about three minutes of read English."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile decodes the test speech")
    frames = []
    for line in (shared / "speech/arctic.jsonl").read_text().splitlines()[:60]:
        path = shared / "speech" / json.loads(line)["audio_filepath"]
        frames.append(log_mel(soundfile.read(path, dtype="float32")[0]))
    return np.concatenate(frames)
