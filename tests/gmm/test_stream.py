"""What can be fitted on, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from gmm_jepa import GaussianMixture, InputError
from gmm_jepa.gmm.seeding import kmeans_plus_plus, sample_stream
from gmm_jepa.gmm.stream import FrameStream


class Shards:
    """A re-iterable of uneven batches, as a corpus would give."""

    def __init__(self, frames, sizes):
        self.parts = np.split(frames, np.cumsum(sizes))
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from self.parts


def _fit(X, **kwargs):
    return GaussianMixture(3, **kwargs).fit(X)


def test_every_kind_of_stream_gives_the_same_mixture(blobs, tmp_path):
    expected = _fit(blobs)
    np.save(tmp_path / "frames.npy", blobs)
    parts = np.split(blobs, [1, 1, 700, 2999])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(blobs)),
        batch_size=256,
        collate_fn=lambda rows: torch.stack([row for (row,) in rows]),
    )
    streams = {
        "list of arrays": parts,
        "list of tensors": [torch.from_numpy(p) for p in parts],
        "tensor": torch.from_numpy(blobs),
        "nested list": blobs.tolist(),
        "re-iterable": Shards(blobs, [10, 500, 0, 77]),
        "function": lambda: iter(parts),
        "generator function": lambda: (p for p in parts),
        "memory map": np.load(tmp_path / "frames.npy", mmap_mode="r"),
        "reversed twice": blobs[::-1].copy()[::-1],
        "loader": loader,
    }
    for name, stream in streams.items():
        got = _fit(stream)
        np.testing.assert_allclose(got.means_, expected.means_, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(got.lower_bounds_, expected.lower_bounds_, err_msg=name)
        assert got.score(stream) == pytest.approx(expected.score(blobs))


def test_one_pass_for_the_start_and_one_an_iteration(blobs):
    shards = Shards(blobs, [1000, 1000])
    fitted = _fit(shards)
    assert shards.passes == 1 + fitted.n_iter_


def test_one_shot_iterators_are_refused(blobs):
    for once in (iter([blobs]), (b for b in [blobs]), map(np.asarray, [blobs])):
        with pytest.raises(InputError, match="X: expected something that can be iterated more"):
            _fit(once)
    used = iter([blobs])
    with pytest.raises(InputError, match="the same iterator twice"):
        _fit(lambda: used)


def test_a_stream_that_changes_is_refused(blobs):
    sizes = iter([3000, 2000])
    with pytest.raises(InputError, match="a later pass gave 2000 rows, the first 3000"):
        _fit(lambda: [blobs[: next(sizes)]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_refused_by_their_row(blobs, bad):
    blobs[2345, 2] = bad
    for stream in (blobs, torch.from_numpy(blobs), np.split(blobs, [100, 2300])):
        with pytest.raises(InputError, match="row 2345, column 2"):
            _fit(stream)
    fitted = _fit(blobs[:2000])
    for method in (fitted.predict, fitted.predict_proba, fitted.score_samples, fitted.score):
        with pytest.raises(InputError, match="row 345, column 2"):
            method(blobs[2000:])


def test_huge_but_finite_sums_are_not_mistaken_for_infinity():
    frames = np.full((3, 1), 1.7e308)
    assert len(list(FrameStream(frames))) == 1


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.zeros((0, 3)), InputError, r"0 sample\(s\)"),
        ([], InputError, "Expected 2D array, got 1D"),
        (np.zeros((5, 0)), InputError, r"0 feature\(s\) \(shape=\(5, 0\)\)"),
        (np.zeros(5), InputError, "Expected 2D array, got 1D array instead"),
        (np.zeros((5, 2, 2)), InputError, "Expected 2D array, got 3D"),
        ([np.zeros((5, 2)), np.zeros((5, 3))], InputError, "row 5 has 3 features, expected 2"),
        (np.zeros((5, 2), complex), InputError, "Complex data not supported"),
        (scipy.sparse.csr_matrix((5, 2)), TypeError, "sparse"),
        ([["a", "b"]], InputError, "X: expected numbers"),
        ("frames.npy", TypeError, "X: expected an array, a tensor or batches, got str"),
        (3, TypeError, "got int"),
        (np.zeros((2, 2)), InputError, "Expected n_samples >= n_components .* 3, n_samples = 2"),
    ],
)
def test_other_input_is_refused(X, error, message):
    with pytest.raises(error, match=message):
        _fit(X)


def test_integers_and_half_precision_are_frames_too(blobs):
    whole = np.round(10 * blobs)
    expected = _fit(whole)
    for X in (whole.astype(np.int32), torch.from_numpy(whole).int(), whole.astype(np.float16)):
        np.testing.assert_allclose(_fit(X).means_, expected.means_, rtol=1e-6)


def test_the_sample_does_not_depend_on_batches(blobs):
    def sample(stream):
        return sample_stream(stream, 100, np.random.default_rng(3))

    whole = sample([torch.from_numpy(blobs)])
    assert whole.shape == (100, 3)
    assert torch.equal(whole, sample(FrameStream(Shards(blobs, [1, 2, 3, 500]))))
    everything = sample_stream(FrameStream(blobs), 5000, np.random.default_rng(3))
    np.testing.assert_array_equal(everything.numpy(), blobs)


def test_the_sample_is_uniform_over_the_stream():
    """Row numbers of a sample of a tenth: mean and spread of a uniform distribution."""
    rows = np.arange(20_000.0)[:, None]
    got = sample_stream(FrameStream(Shards(rows, [5000] * 3)), 2000, np.random.default_rng(0))
    assert len(torch.unique(got)) == 2000
    share = got.flatten() / 20_000
    assert float(share.mean()) == pytest.approx(0.5, abs=3 * 0.289 / 2000**0.5)
    assert float(share.std()) == pytest.approx(0.289, abs=0.01)
    assert (share.diff() > 0).all()


def test_kmeans_plus_plus_finds_every_cluster():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    frames = centres.repeat(200, 1) + 0.1 * torch.randn(800, 2) + 1e4
    for seed in range(5):
        got = kmeans_plus_plus(frames, 4, np.random.default_rng(seed))
        assert {tuple(row) for row in ((got - 1e4) / 100).round().tolist()} == {
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
        }


def test_batches_may_be_of_several_types(blobs):
    batches = [blobs[:40].astype(np.float32), torch.as_tensor(blobs[40:]).double()]
    model = GaussianMixture(3, random_state=0).fit(batches)
    whole = np.concatenate([np.asarray(batch, np.float64) for batch in batches])
    again = GaussianMixture(3, random_state=0).fit([whole[:40], whole[40:]])
    np.testing.assert_allclose(model.means_, again.means_, rtol=1e-9)


def test_a_field_of_records_is_an_array():
    records = np.zeros(30, [("flag", "i1"), ("frame", "f4", (3,))])
    records["frame"] = np.random.default_rng(0).standard_normal((30, 3))
    model = GaussianMixture(2, random_state=0).fit(records["frame"])
    again = GaussianMixture(2, random_state=0).fit(records["frame"].copy())
    np.testing.assert_array_equal(model.means_, again.means_)
