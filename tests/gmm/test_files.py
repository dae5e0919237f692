"""Mixture files: there and back, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmm_jepa import GaussianMixture, InputError, LogMelSpec, gmm_posterior
from gmm_jepa.gmm import NotFittedError, load_mixture, load_published_mixture, save_mixture

SPEC = LogMelSpec()


@pytest.fixture
def fitted() -> GaussianMixture:
    frames = np.random.default_rng(0).standard_normal((300, 80)) * 3
    return GaussianMixture(4, variance_floor=0.2, random_state=11, max_iter=50).fit(frames)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gmm.safetensors"


def test_there_and_back(fitted, path):
    fitted.save(path, front_end=SPEC)
    loaded = GaussianMixture.load(path, front_end=LogMelSpec())
    for name in ("weights_", "means_", "covariances_"):
        assert (getattr(loaded, name) == getattr(fitted, name)).all()
    for name in ("lower_bounds_", "lower_bound_", "converged_", "n_iter_", "n_reseeded_"):
        assert getattr(loaded, name) == getattr(fitted, name)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.front_end_ == SPEC
    assert loaded.n_frames_ == 300
    frames = np.random.default_rng(1).standard_normal((20, 80))
    np.testing.assert_array_equal(loaded.predict_proba(frames), fitted.predict_proba(frames))
    again = path.with_name("again.safetensors")
    loaded.save(again)
    with safe_open(again, "pt") as copy, safe_open(path, "pt") as file:
        assert copy.metadata() == file.metadata()


def test_numpy_numbers_are_stored_as_plain_ones(path):
    frames = np.random.default_rng(0).standard_normal((50, 3))
    mixture = GaussianMixture(
        np.int64(2),
        random_state=np.int64(3),
        max_iter=np.int64(5),
        tol=np.float32(0.5),
        variance_floor=np.float32(0.25),
        n_init_frames=np.int32(50),
    )
    mixture.fit(frames).save(path)
    assert GaussianMixture.load(path).get_params() == mixture.get_params()


def test_a_missing_folder_is_made(fitted, path):
    fitted.save(path.parent / "new" / path.name)
    assert load_mixture(path.parent / "new" / path.name).means_.shape == (4, 80)


def test_an_encoder_in_bfloat16_is_no_mixture(path):
    save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(InputError, match="not a mixture file"):
        load_mixture(path)


def test_another_front_end_is_refused_and_both_are_shown(fitted, path):
    fitted.save(path, front_end=SPEC)
    other = LogMelSpec(hop_samples=160)
    with pytest.raises(InputError) as refused:
        load_mixture(path, front_end=other)
    assert SPEC.describe() in str(refused.value)
    assert other.describe() in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_without_a_front_end_fits_none(fitted, path):
    save_mixture(path, fitted)
    assert load_mixture(path).front_end_ is None
    with pytest.raises(InputError, match=r"names no front end .*; expected log-mel 16000 Hz"):
        load_mixture(path, front_end=SPEC)


def test_a_front_end_of_other_width_is_not_saved(fitted, path):
    with pytest.raises(InputError, match="front_end: expected 80 mels"):
        fitted.save(path, front_end=LogMelSpec(n_mels=40))
    assert not path.exists()
    with pytest.raises(NotFittedError):
        GaussianMixture(2).save(path)


@pytest.mark.parametrize("where", [-1, -3000, 12])
def test_a_damaged_file_is_refused(fitted, path, where):
    fitted.save(path, front_end=SPEC)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        load_mixture(path)


def test_damage_that_keeps_the_format_is_refused_by_the_hash(fitted, path):
    fitted.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["means"][0, 0] += 1e-9
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="damaged, its content does not match its sha256"):
        load_mixture(path)
    save_file({**tensors, "means": tensors["means"].bfloat16()}, path, metadata)
    with pytest.raises(InputError, match="damaged, its tensors are not of float32 or float64"):
        load_mixture(path)
    tensors["means"] = torch.from_numpy(fitted.means_)
    description = json.loads(metadata["mixture"])
    description["variance_floor"] = 3.0
    save_file(tensors, path, {**metadata, "mixture": json.dumps(description)})
    with pytest.raises(InputError, match="sha256"):
        load_mixture(path)


def test_other_files_are_refused(fitted, path):
    with pytest.raises(InputError, match="not a mixture file"):
        load_mixture(path)
    path.write_bytes(b"RIFF nonsense")
    with pytest.raises(InputError, match="not a mixture file"):
        load_mixture(path)
    save_file({"means": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a mixture file"):
        load_mixture(path)
    fitted.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "format_version": "99"})
    with pytest.raises(InputError, match="format version 99, expected 1"):
        load_mixture(path)


def test_a_failed_save_leaves_the_old_file(fitted, path, monkeypatch):
    fitted.save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    fitted.means_ = fitted.means_ + 1.0
    with pytest.raises(OSError, match="No space"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_published_mixture_gives_the_published_posteriors(shared):
    gm = load_published_mixture(shared / "golden/gmm.pt")
    golden = load_file(shared / "golden/conformer_plain/io.safetensors")
    frames = golden["log_mel"].transpose(1, 2)[:, :99]
    stored = torch.load(shared / "golden/gmm.pt", weights_only=True)
    np.testing.assert_array_equal(gm.covariances_, stored["covariances"].double().numpy() + 1e-6)
    exact = gmm_posterior(frames, gm, precision="exact")
    torch.testing.assert_close(exact, golden["posteriors"], atol=1e-5, rtol=0)
    fast = gmm_posterior(frames, gm)
    torch.testing.assert_close(fast, golden["posteriors"], atol=1e-3, rtol=0)


def test_foreign_pickles_are_not_loaded(path):
    class Surprise:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    for content in ({"means": Surprise()}, {"means": torch.zeros(2, 3)}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(InputError, match="not a published mixture"):
            load_published_mixture(path)
    with pytest.raises(InputError, match="no such file"):
        load_published_mixture(path.with_name("absent.pt"))
