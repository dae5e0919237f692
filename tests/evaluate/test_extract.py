"""Features and cluster posteriors of one utterance, short or long."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.embed import FrameTable, heard_frames
from gmm_jepa.evaluate.extract import CONTEXT_FRAMES, WINDOW_FRAMES, Extractor
from gmm_jepa.models import JepaModel
from tests.audio import babble
from tests.models.small import SMALL


@pytest.fixture
def model() -> JepaModel:
    return JepaModel(SMALL, 6)


@pytest.mark.parametrize("head_input", ["encoder", "predictor"])
def test_posteriors_are_those_of_what_the_head_reads(model: JepaModel, head_input: str) -> None:
    waveform = babble(20_000, 1)
    found = Extractor(model, clusters=True, head_input=head_input)(waveform)
    with torch.no_grad():
        z = model.encode(torch.from_numpy(waveform)[None]).output
        heard = model.predict(z, None) if head_input == "predictor" else z
        expected = model.cluster_head(heard)[0].softmax(-1)
    np.testing.assert_allclose(found["output"], z[0], atol=1e-6)
    np.testing.assert_allclose(found["clusters"], expected, atol=1e-6)
    table = FrameTable(z[0], np.array([0, z.shape[1]]), 320, 0.0)
    np.testing.assert_allclose(heard_frames(model, table, head_input), heard[0], atol=1e-6)


def test_the_predictor_hears_around_a_window(
    model: JepaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    predict = model.predict

    def listen(z: torch.Tensor, keep: None) -> torch.Tensor:
        heard.append(z.shape[1])
        return predict(z, keep)

    monkeypatch.setattr(model, "predict", listen)
    n_frames = WINDOW_FRAMES + 200
    found = Extractor(model, clusters=True, head_input="predictor")(babble(320 * n_frames, 2))
    assert len(found["clusters"]) == len(found["output"]) == model.online.n_frames(320 * n_frames)
    assert heard[0] >= WINDOW_FRAMES + CONTEXT_FRAMES
    assert heard[1] >= 200 + CONTEXT_FRAMES - 2


def test_what_is_not_there_is_refused_before_any_audio(model: JepaModel) -> None:
    with pytest.raises(InputError, match="layers: expected 0 to 2, got 3"):
        Extractor(model, layers=(3,))
    headless = JepaModel(SMALL, 0, cluster_head="none")
    with pytest.raises(InputError, match="clusters: this run has no cluster head"):
        Extractor(headless, clusters=True)
