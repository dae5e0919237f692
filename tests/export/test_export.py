"""Encoders in other tools give the numbers they give here, on ragged batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gmm_jepa.cli import main
from gmm_jepa.encoder import SpeechEncoder, load_encoder
from gmm_jepa.export.graph import MIN_SAMPLES, OUTPUTS
from gmm_jepa.export.s3prl import UpstreamExpert
from gmm_jepa.model_file import save_model
from gmm_jepa.models import JepaModel
from tests.models.small import FULL, SMALL, TRANSFORMER, ragged_batch, shake

CONFIGS = {
    "conformer": replace(FULL, residual_blocks=1, layers=1),
    "plain conformer": replace(SMALL, residual_blocks=1, layers=1, aggregation="last"),
    "transformer": replace(TRANSFORMER, layers=1),
}
BATCHES = [[32_000, 20_000, 9_000], [50_007, 33_333], [MIN_SAMPLES]]


@pytest.fixture(scope="module", params=CONFIGS)
def model_file(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    # Not far from the start: a wilder net of this size multiplies rounding by a thousand.
    save_model(path, shake(JepaModel(CONFIGS[request.param], 5), 0.05))
    return path


@pytest.fixture
def encoder(model_file: Path) -> SpeechEncoder:
    return load_encoder(model_file)


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.asarray(theirs), ours.detach().numpy(), atol=1e-4, rtol=0)


def test_a_torch_program_and_onnx(model_file: Path, encoder: SpeechEncoder, tmp_path: Path):
    """One trace serves both; every batch is of another shape than the traced one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    program_file, onnx_file = tmp_path / "encoder.pt2", tmp_path / "encoder.onnx"
    command = ["export", "--source", str(model_file)]
    command += ["--torch-export", str(program_file), "--onnx", str(onnx_file)]
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.onnx", "encoder.pt2"}
    program = torch.export.load(program_file).module()
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for lengths in BATCHES:
        waveform, lengths_samples = ragged_batch(lengths)
        expected = encoder(waveform, lengths_samples)
        feeds = {"waveform": waveform.numpy(), "lengths": lengths_samples.numpy()}
        for output, layers, n_frames in (
            program(waveform, lengths_samples),
            session.run(list(OUTPUTS), feeds),
        ):
            close(expected.last_hidden_state, torch.as_tensor(output).detach())
            close(torch.stack(expected.hidden_states), torch.as_tensor(layers).detach())
            assert n_frames.tolist() == expected.lengths.tolist()


def test_hugging_face(model_file: Path, encoder: SpeechEncoder, tmp_path: Path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "hf"
    assert main(["export", "--source", str(model_file), "--hf", str(out)]) == 0
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(out)
    waveform, lengths = ragged_batch([9000, 6400])
    rows = [row[:n].numpy() for row, n in zip(waveform, lengths.tolist())]
    batch = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [9000, 6400]
    found = model(**batch, output_hidden_states=True)
    expected = encoder(waveform, lengths)
    close(expected.last_hidden_state, found.last_hidden_state.detach())
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(expected.hidden_states, found.hidden_states):
        close(ours, theirs.detach())
    assert model(batch["input_values"], return_dict=False)[0].shape == found[0].shape
    assert "gmm_jepa" in (out / "README.md").read_text()


def test_the_contract_of_s3prl(model_file: Path, encoder: SpeechEncoder):
    repository = Path(__file__).resolve().parents[2]
    before = list(sys.path)
    upstream = torch.hub.load(str(repository), "gmm_jepa_local", source="local", ckpt=model_file)
    sys.path[:] = before
    assert isinstance(upstream, UpstreamExpert)
    assert upstream.get_downsample_rates("hidden_states") == 320
    waveform, lengths = ragged_batch([9000, 6400])
    wavs = [row[:n] for row, n in zip(waveform, lengths.tolist())]
    found = upstream(wavs)["hidden_states"]
    assert isinstance(found, list)
    for ours, theirs in zip(encoder(waveform, lengths).hidden_states, found, strict=True):
        close(ours, theirs.detach())
        assert abs(theirs.shape[1] - round(9000 / 320)) < 5


def test_s3prl_itself_takes_the_upstream(model_file: Path):
    interfaces = pytest.importorskip("s3prl.upstream.interfaces", reason="s3prl is not installed")
    upstream = UpstreamExpert(model_file)
    featurizer = interfaces.Featurizer(upstream, "hidden_states", "cpu")
    wavs = [torch.randn(9000), torch.randn(6400)]
    features = featurizer(wavs, upstream(wavs))
    assert featurizer.downsample_rate == 320
    for wav, feature in zip(wavs, features, strict=True):  # s3prl rounds, and takes what there is
        assert abs(len(feature) - len(wav) / 320) < 1.5
        assert feature.shape[1] == featurizer.output_dim


def test_refusals(model_file: Path, tmp_path: Path, capsys):
    assert main(["export", "--source", str(model_file)]) == 2
    assert "expected --hf, --onnx or --torch-export" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    for format in ("--hf", "--onnx", "--torch-export"):
        command = ["export", "--source", str(model_file), format, str(tmp_path / "there")]
        assert main(command) == 2
        assert "exists already" in capsys.readouterr().err
