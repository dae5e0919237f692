"""Upstreams: frames, batches, controls, Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from gmm_jepa.downstream.features import ComputedFeatures, open_features
from gmm_jepa.downstream.sweep import with_controls
from gmm_jepa.downstream.upstreams import HuggingFaceEncoder, LogMel, open_upstream
from gmm_jepa.encoder import load_encoder
from gmm_jepa.errors import InputError
from gmm_jepa.features import log_mel
from tests.audio import babble

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (6,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
LENGTHS = (16_000, 9_000, 400, 12_345)


def waveforms() -> list[torch.Tensor]:
    return [torch.from_numpy(babble(n, seed)) for seed, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """Folders of tiny models: front end normalised over time, and over channels."""
    folders = {}
    for norm, make, config in (
        ("group", HubertModel, HubertConfig(**TINY)),
        ("layer", WavLMModel, WavLMConfig(**TINY, feat_extract_norm="layer", conv_bias=True)),
    ):
        torch.manual_seed(5)
        folder = tmp_path_factory.mktemp(norm)
        make(config).save_pretrained(folder)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=norm == "layer")
        extractor.save_pretrained(folder)
        folders[norm] = folder
    return folders


@pytest.fixture(params=["ours", "log-mel", "group", "layer"])
def upstream(request, encoder_file, hubert):
    if request.param == "log-mel":
        return LogMel()
    source = encoder_file if request.param == "ours" else hubert[request.param]
    return open_upstream(str(source))


def test_what_else_is_in_the_batch_changes_no_feature(upstream):
    together = upstream(waveforms())
    for batched, waveform in zip(together, waveforms()):
        (alone,) = upstream([waveform])
        assert batched.shape == alone.shape
        assert batched.shape[1:] == (upstream.n_layers, upstream.width)
        assert len(batched) == upstream.n_frames(len(waveform))
        torch.testing.assert_close(batched, alone, rtol=1e-4, atol=2e-5)


def test_frames_follow_the_samples(upstream):
    hop = upstream.hop_samples
    for n in (hop * 3, hop * 3 + hop // 2 - 1, hop * 3 + hop // 2 + 1, 25_000):
        if n >= 400:
            (rows,) = upstream([torch.from_numpy(babble(n, 0))])
            assert len(rows) == max(1, round(n / hop))


def test_log_mel_is_the_projects_own():
    waveform = waveforms()[0]
    (rows,) = LogMel()([waveform])
    torch.testing.assert_close(4 * rows[:, 0] - 6, log_mel(waveform)[:50], rtol=0, atol=1e-5)


def test_our_layers_are_the_encoders(encoder_file):
    waveform = waveforms()[0]
    encoded = load_encoder(encoder_file)(waveform)
    (rows,) = open_upstream(str(encoder_file))([waveform])
    n = min(len(rows), encoded.last_hidden_state.shape[1])
    for i, layer in enumerate(encoded.hidden_states):
        torch.testing.assert_close(rows[:n, i], layer[0, :n])


def test_an_exported_folder_is_the_same_encoder(encoder_file, tmp_path):
    from gmm_jepa.export.huggingface import save_huggingface

    save_huggingface(load_encoder(encoder_file), tmp_path / "hf")
    waveforms = [torch.randn(9000), torch.randn(6400)]
    exported, own = open_upstream(str(tmp_path / "hf")), open_upstream(str(encoder_file))
    for a, b in zip(exported(waveforms), own(waveforms), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_hugging_face_states_are_transformers_own(hubert, norm):
    upstream = open_upstream(str(hubert[norm]))
    assert isinstance(upstream, HuggingFaceEncoder)
    waveform = waveforms()[0]
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(hubert[norm])
    values = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    model = (HubertModel if norm == "group" else WavLMModel).from_pretrained(hubert[norm]).eval()
    with torch.no_grad():
        states = model(values, output_hidden_states=True).hidden_states
    (rows,) = upstream([waveform])
    assert upstream.n_layers == len(states) == 3
    for i, state in enumerate(states):
        torch.testing.assert_close(rows[:49, i], state[0], rtol=1e-4, atol=1e-5)


def test_controls_have_the_same_settings_and_other_weights(encoder_file, hubert):
    ours, theirs = open_upstream(str(encoder_file)), open_upstream(str(hubert["group"]))
    rows = with_controls([ours, open_upstream(str(encoder_file), "again"), theirs])
    kinds = ["trained", "untrained", "trained", "trained", "untrained", "log-mel"]
    assert [row.kind for row in rows] == kinds
    for trained, fresh in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert trained.describe() == fresh.describe()
        assert trained.fingerprint() != fresh.fingerprint()
        assert fresh.fingerprint() == trained.untrained().fingerprint()


def test_what_holds_one_encoder_has_no_teacher(encoder_file, tmp_path):
    from gmm_jepa.export.huggingface import save_huggingface

    save_huggingface(load_encoder(encoder_file), tmp_path / "hf")
    with pytest.raises(InputError, match="holds one encoder alone"):
        open_upstream(str(tmp_path / "hf"), teacher=True)
    open_upstream(str(encoder_file), teacher=True)


def test_mistakes_are_one_clear_line(tmp_path):
    for source in ("no/such/model/anywhere", str(tmp_path / "absent.pt")):
        with pytest.raises(InputError, match="no such file"):
            open_upstream(source)
    with pytest.raises(InputError, match="too short"):
        LogMel()([torch.zeros(0)])


class _Short:
    """A corpus of one utterance too short for Hugging Face's front end."""

    durations_samples = np.array([300])

    def read(self, _i):
        return babble(300, 0)

    def locate(self, _i):
        return "short.wav", 1, "m.jsonl"


def test_audio_too_short_is_named(hubert):
    upstream = open_upstream(str(hubert["group"]))
    with pytest.raises(InputError, match=r"300 samples are too short.*short\.wav"):
        ComputedFeatures(upstream, _Short()).batch([0])


def test_memory_disk_and_the_fly_give_the_same(encoder_file, audio, tmp_path):
    from gmm_jepa.downstream.data import open_manifest

    corpus, upstream = open_manifest(audio), open_upstream(str(encoder_file))
    path = tmp_path / "cache" / "x.npy"
    batches = []
    for memory, disk in ((64, 0), (0, 64), (0, 0)):
        features = open_features(upstream, corpus, memory_mib=memory, disk_mib=disk, path=path)
        assert path.exists() == (disk > 0) or memory == 0
        batches.append(features.batch([3, 0, 7]))
    for x, lengths in batches[1:]:
        torch.testing.assert_close(x, batches[0][0], rtol=1e-4, atol=1e-5)
        assert lengths.tolist() == batches[0][1].tolist()
