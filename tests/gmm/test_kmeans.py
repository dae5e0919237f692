"""k-means on streams: against scikit-learn, from files, over processes, on odd data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import is_clusterer

from gmm_jepa import GaussianMixture, LogMelSpec
from gmm_jepa.errors import InputError
from gmm_jepa.gmm import KMeans, load_published_kmeans
from gmm_jepa.gmm.seeding import first_centroids
from gmm_jepa.ops import EMStatistics, kmeans_statistics


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(0.0, 5.0, (7, 13))
    return centres[random.integers(7, size=2000)] + random.standard_normal((2000, 13))


def test_it_finds_what_scikit_learn_finds(blobs):
    from sklearn.cluster import KMeans as Peer

    ours = KMeans(7).fit(blobs)
    peer = Peer(7, n_init=1, init=ours.cluster_centers_, max_iter=1).fit(blobs)
    np.testing.assert_allclose(ours.cluster_centers_, peer.cluster_centers_, atol=1e-9)
    np.testing.assert_array_equal(ours.predict(blobs), peer.predict(blobs))
    assert ours.score(blobs) == pytest.approx(-peer.inertia_, rel=1e-5)
    assert ours.inertia_ == pytest.approx(peer.inertia_, rel=1e-5)


def test_labels_are_the_nearest_centroids(blobs):
    kmeans = KMeans(5, max_iter=3).fit(blobs)
    distances = ((blobs[:, None] - kmeans.cluster_centers_) ** 2).sum(-1)
    np.testing.assert_array_equal(kmeans.predict(blobs), distances.argmin(1))
    labels = kmeans.predict(torch.from_numpy(blobs).float())
    assert labels.dtype == torch.int64
    assert (labels.numpy() == distances.argmin(1)).mean() > 0.999  # float32 frames


def test_a_stream_gives_what_the_whole_gives(blobs):
    whole = KMeans(6).fit(blobs)
    parts = [torch.from_numpy(part) for part in np.array_split(blobs, 9)]
    streamed = KMeans(6).fit(parts)
    np.testing.assert_allclose(streamed.cluster_centers_, whole.cluster_centers_, atol=1e-10)


def test_the_inertia_never_rises(blobs):
    seen = []
    KMeans(20, tol=0.0, max_iter=15).fit(blobs, on_iteration=lambda _, value: seen.append(value))
    assert len(seen) > 3
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(seen))


def test_two_processes_fit_the_same(blobs):
    """One process here; the other's sums are made from its half at the same centroids."""
    whole = KMeans(6, max_iter=4, tol=0.0).fit(blobs)
    sample = torch.from_numpy(blobs)
    choosing = np.random.default_rng(np.random.SeedSequence(0).spawn(2)[1])
    centroids = first_centroids(sample, 6, choosing)

    def all_reduce(own: EMStatistics) -> EMStatistics:
        nonlocal centroids
        other = kmeans_statistics(sample[1::2], centroids)
        total = EMStatistics(*(a + b for a, b in zip(own, other)))
        centroids = total.first / total.counts[:, None]
        return total

    one = KMeans(6, max_iter=4, tol=0.0)
    one.fit(blobs[::2], all_reduce=all_reduce, start_frames=sample)
    np.testing.assert_allclose(one.cluster_centers_, whole.cluster_centers_, atol=1e-9)


def test_files(tmp_path, blobs):
    path = tmp_path / "kmeans.safetensors"
    spec = LogMelSpec(n_mels=13)
    kmeans = KMeans(7, max_iter=2).fit(blobs)
    kmeans.save(path, front_end=spec)
    loaded = KMeans.load(path, front_end=spec)
    np.testing.assert_array_equal(loaded.cluster_centers_, kmeans.cluster_centers_)
    assert (loaded.inertia_, loaded.n_iter_) == (kmeans.inertia_, kmeans.n_iter_)
    assert loaded.front_end_ == spec
    with pytest.raises(InputError, match="expected"):
        KMeans.load(path, front_end=LogMelSpec())
    with pytest.raises(InputError, match="expected 13 mels"):
        kmeans.save(path, front_end=LogMelSpec())
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        KMeans.load(path)


def test_numpy_numbers_are_stored_as_plain_ones(tmp_path, blobs):
    path = tmp_path / "kmeans.safetensors"
    kmeans = KMeans(np.int64(7), random_state=np.int64(3), max_iter=np.int64(2), tol=np.float32(0))
    kmeans.fit(blobs).save(path)
    assert KMeans.load(path).get_params() == kmeans.get_params()


def test_scikit_learn_takes_it_for_a_clusterer():
    assert is_clusterer(KMeans())
    assert not is_clusterer(GaussianMixture())


def test_a_mixture_file_is_no_kmeans_file(tmp_path, blobs):
    path = tmp_path / "gmm.safetensors"
    GaussianMixture(3, max_iter=2, tol=0.0).fit(blobs).save(path)
    with pytest.raises(InputError, match="not a kmeans file"):
        KMeans.load(path)


def test_the_published_file(shared):
    kmeans = load_published_kmeans(shared / "golden" / "kmeans.pt")
    assert kmeans.cluster_centers_.shape == (24, 80)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.full((5, 2), np.nan), {}, "NaN"),
        (np.zeros((1, 2)), {}, "n_samples=1 should be >= n_clusters=3"),
        (np.zeros((9, 2)), {"max_iter": 0}, "max_iter: expected a whole number"),
        (np.zeros((9, 2)), {"tol": -1.0}, "tol: expected 0 or more"),
        (np.zeros((9, 2)), {"n_init_frames": 2}, "n_init_frames: expected at least"),
    ],
)
def test_refusals(data, options, message):
    with pytest.raises(InputError, match=message):
        KMeans(3, **options).fit(data)


def test_equal_rows_and_more_clusters_than_distinct_rows():
    kmeans = KMeans(4, max_iter=10).fit(np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0))
    assert np.isfinite(kmeans.cluster_centers_).all()
    assert kmeans.score([[1.0, 2.0], [3.0, 4.0]]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_of_half_precision_frames_are_those_of_their_values(blobs, dtype):
    model = KMeans(5, random_state=0).fit(blobs)
    frames = torch.as_tensor(blobs).to(dtype)
    squared = (frames.double()[:, None] - torch.from_numpy(model.cluster_centers_)).square().sum(-1)
    assert torch.equal(model.predict(frames), squared.argmin(1))
    assert model.score(frames) == pytest.approx(-float(squared.amin(1).sum()), rel=1e-6)


def test_a_default_device_is_not_the_device_of_arrays(blobs):
    expected = KMeans(3).fit(blobs).cluster_centers_
    with torch.device("meta"):
        np.testing.assert_array_equal(KMeans(3).fit(blobs).cluster_centers_, expected)
