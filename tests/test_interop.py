"""Conversions to and from the published files, and encoders loaded from everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gmm_jepa
from gmm_jepa.cli import main
from gmm_jepa.errors import InputError
from gmm_jepa.gmm import GaussianMixture, KMeans
from gmm_jepa.interop import convert
from gmm_jepa.model_file import load_model, save_model
from gmm_jepa.models import JepaModel, export_published
from gmm_jepa.models.published import published_config
from tests.models.small import FULL, TRANSFORMER, ragged_batch, shake

VARIANTS = ["conformer_plain", "conformer_daam_relpos", "transformer", "wavlm_style"]
KINDS = {
    "conformer": (FULL, {}),
    "transformer": (TRANSFORMER, {}),
    "WavLM-style": (
        replace(FULL, aggregation="last"),
        {"cluster_head": "linear", "predicts": False},
    ),
}


def equal(a: object, b: object, where: str = "") -> None:
    """Same keys, values, dtypes and bytes, whatever is nested."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            equal(a[name], b[name], f"{where}.{name}")
    else:
        assert a == b, where


LOGARITHMS = ("log_vars", "log_weights")
"""Entries of a published mixture that follow from the others, to a digit of the processor's own."""


def there_and_back(source: Path, folder: Path) -> None:
    out = folder / "back" / source.name
    assert main(["convert", "--source", str(source), "--out", str(folder / "a.safetensors")]) == 0
    assert main(["convert", "--source", str(folder / "a.safetensors"), "--out", str(out)]) == 0
    published, back = (torch.load(path, weights_only=True) for path in (source, out))
    for name in LOGARITHMS:
        if name in published:
            expected = published.pop(name)
            torch.testing.assert_close(back.pop(name), expected, rtol=2**-23, atol=0.0)
    equal(published, back)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_models_come_back_to_the_byte(shared: Path, tmp_path: Path, variant: str):
    source = shared / "golden" / variant / "portable_step7.pt"
    there_and_back(source, tmp_path)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    published = json.loads(source.with_name("config.json").read_text())
    assert {name: published[name] for name in back if name in published} == {
        name: value for name, value in back.items() if name in published
    }


@pytest.mark.parametrize("name", ["gmm.pt", "kmeans.pt"])
def test_published_clusters_come_back_to_the_byte(shared: Path, tmp_path: Path, name: str):
    there_and_back(shared / "golden" / name, tmp_path)


def test_published_clusters_of_80_features_are_of_the_default_front_end(tmp_path: Path):
    spec, means, counts = gmm_jepa.LogMelSpec(), torch.randn(3, 80), torch.ones(3)
    torch.save(
        {"means": means, "covariances": means.exp(), "weights": counts / 3}, tmp_path / "g.pt"
    )
    torch.save({"centroids": means, "counts": counts}, tmp_path / "k.pt")
    for name, kind in (("g", GaussianMixture), ("k", KMeans)):
        convert(tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors")
        kind.load(tmp_path / f"{name}.safetensors", front_end=spec)
    torch.save({"centroids": means[:, :20], "counts": counts}, tmp_path / "o.pt")
    convert(tmp_path / "o.pt", tmp_path / "o.safetensors")
    assert KMeans.load(tmp_path / "o.safetensors").front_end_ is None


def test_a_config_is_for_published_models_only(tmp_path: Path):
    torch.save({"centroids": torch.randn(3, 80), "counts": torch.ones(3)}, tmp_path / "k.pt")
    for source, out in (("k.pt", "k.safetensors"), ("m.safetensors", "m.pt")):
        with pytest.raises(InputError, match="config: expected with a published model only"):
            convert(tmp_path / source, tmp_path / out, config=tmp_path / "config.json")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch):
    save_model(tmp_path / "m.safetensors", JepaModel(FULL, 5))

    def full(*_arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            convert(tmp_path / "m.safetensors", tmp_path / "out" / "m.pt")
    assert not list((tmp_path / "out").iterdir())
    convert(tmp_path / "m.safetensors", tmp_path / "out" / "m.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind_come_back(tmp_path: Path, kind: str):
    config, options = KINDS[kind]
    model = shake(JepaModel(config, 5, **options))
    torch.save({**export_published(model, step=3, total_seconds=7.5)}, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps(published_config(model)))
    there_and_back(tmp_path / "m.pt", tmp_path)


def test_a_model_file_says_what_it_is(tmp_path: Path):
    model = shake(JepaModel(TRANSFORMER, 0, cluster_head="none"))
    save_model(tmp_path / "model.safetensors", model, step=9, total_seconds=1.5)
    stored = load_model(tmp_path / "model.safetensors")
    assert (stored.step, stored.total_seconds, stored.model.config) == (9, 1.5, TRANSFORMER)
    equal(dict(model.state_dict()), dict(stored.model.state_dict()))
    with pytest.raises(InputError, match="no published kind"):
        convert(tmp_path / "model.safetensors", tmp_path / "model.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, capsys):
    source, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    torch.save({"weights": torch.zeros(2)}, source)
    with pytest.raises(InputError, match="no published kind has the entries weights"):
        convert(source, out)
    torch.save({"means": torch.zeros(3, 2), "covariances": torch.ones(3, 2)}, source)
    with pytest.raises(InputError, match="no 'weights'"):
        convert(source, out)
    torch.save({"online": {}, "target": {}}, source)
    with pytest.raises(InputError, match=r"config.json: no such file"):
        convert(source, out)
    with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors"):
        convert(source, tmp_path / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    out.write_text("mine")
    assert main(["convert", "--source", str(source), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_an_encoder_from_a_published_file(shared: Path):
    encoder = gmm_jepa.load_encoder(shared / "golden" / "conformer_plain" / "portable_step7.pt")
    waveform, lengths = ragged_batch([6400, 3200])
    encoded = encoder(waveform, lengths)
    alone = encoder(waveform[1, :3200])
    assert encoded.lengths.tolist() == [encoder.encoder.n_frames(n) for n in (6400, 3200)]
    assert len(encoded.hidden_states) == 3
    torch.testing.assert_close(
        encoded.last_hidden_state[1, : encoded.lengths[1]], alone.last_hidden_state[0]
    )
    assert (encoded.last_hidden_state[1, encoded.lengths[1] :] == 0).all()


def test_an_encoder_says_what_it_cannot_take(tmp_path: Path):
    save_model(tmp_path / "m.safetensors", JepaModel(FULL, n_clusters=8))
    encoder = gmm_jepa.load_encoder(tmp_path / "m.safetensors")
    waveform = 0.1 * torch.randn(2, 8_000)
    expected = encoder(waveform, torch.tensor([8_000, 5_000])).last_hidden_state
    array = encoder(waveform.double().numpy(), [8_000, 5_000]).last_hidden_state
    assert torch.equal(array, expected)
    for lengths in ([8_001, 5], [-1, 5]):
        with pytest.raises(InputError, match="lengths: expected 0 to 8000 samples each, got"):
            encoder(waveform, torch.tensor(lengths))
    with pytest.raises(InputError, match="waveform: expected a float"):
        encoder(waveform.int())
    with pytest.raises(InputError, match="pad rows of several lengths"):
        encoder([[0.0, 0.1], [0.1]])
    with pytest.raises(InputError, match="looks like samples by channels"):
        encoder(torch.zeros(8_000, 2))
    words = (waveform * 2**15).round().short()
    torch.testing.assert_close(
        encoder(words).last_hidden_state, encoder(words / 2**15).last_hidden_state
    )
    with pytest.raises(InputError, match="lengths: expected integers"):
        encoder(waveform, [8_000.0, 5.5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoders_of_16_bits_take_any_length(tmp_path: Path, dtype: torch.dtype):
    """Lengths are not rounded to the type, and a quiet row's gain is within it."""
    config = replace(FULL, unit_rms=True)
    save_model(tmp_path / "m.safetensors", JepaModel(config, n_clusters=8))
    encoder = gmm_jepa.load_encoder(tmp_path / "m.safetensors").to(dtype)
    with torch.inference_mode():
        for n_samples in (5_001, 66_013, 70_148):
            waveform = 0.1 * torch.randn(3, n_samples)
            waveform[1] *= 1e-4
            waveform[2] = 0
            got = encoder(waveform).last_hidden_state
            assert got.isfinite().all()
            given = encoder(waveform, torch.full((3,), n_samples)).last_hidden_state
            torch.testing.assert_close(got, given, rtol=0.1, atol=0.1)
            ragged = encoder(waveform, torch.tensor([n_samples, 0, 400])).last_hidden_state
            assert ragged.isfinite().all()


def test_masked_frames_need_a_token(tmp_path: Path):
    encoder = JepaModel(FULL, n_clusters=8).online
    with pytest.raises(InputError, match="mask_token: expected with keep"):
        encoder(torch.zeros(1, 3_200), keep=torch.ones(1, encoder.n_frames(3_200)))


def test_encoders_from_a_model_file(tmp_path: Path):
    model = shake(JepaModel(FULL, 5))
    save_model(tmp_path / "m.safetensors", model)
    waveform, lengths = ragged_batch([6400, 3200])
    for teacher, expected in ((False, model.online), (True, model.teacher)):
        encoder = gmm_jepa.load_encoder(tmp_path / "m.safetensors", teacher=teacher)
        got = encoder(waveform, lengths).last_hidden_state
        assert torch.equal(got, expected.eval()(waveform, lengths).output)
        wide = encoder.double()(waveform, lengths).last_hidden_state
        torch.testing.assert_close(wide.float(), got, rtol=1e-3, atol=1e-4)
    save_model(tmp_path / "n.safetensors", JepaModel(FULL, 5, predicts=False))
    with pytest.raises(InputError, match="without a teacher"):
        gmm_jepa.load_encoder(tmp_path / "n.safetensors", teacher=True)
    with pytest.raises(InputError, match=r"absent\.pt: no such file"):
        gmm_jepa.load_encoder(tmp_path / "absent.pt")
    torch.save({"means": waveform}, tmp_path / "gmm.pt")
    with pytest.raises(InputError, match=r"gmm\.pt: not a published model \(has means\)"):
        gmm_jepa.load_encoder(tmp_path / "gmm.pt")
    with pytest.raises(InputError, match="no such file or folder"):
        gmm_jepa.load_encoder(tmp_path / "absent")
