"""EM against scikit-learn from the same start, and the rules around it."""

from __future__ import annotations

import itertools
import threading
import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Peer

from gmm_jepa import GaussianMixture, ops
from gmm_jepa.errors import InputError
from gmm_jepa.gmm import ConvergenceWarning, KMeans, kmeans
from gmm_jepa.gmm.em import DEAD_FRAMES, MAX_RESEEDS, expectation, maximisation, reseed
from gmm_jepa.ops import EMStatistics, Mixture

pytestmark = pytest.mark.filterwarnings("ignore::gmm_jepa.gmm.estimator.ConvergenceWarning")


def _start(frames: np.ndarray, K: int) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(1).choice(len(frames), K, replace=False)
    precision = 1.0 / frames.var(0, dtype=np.float64)
    return {
        "weights_init": np.full(K, 1.0 / K),
        "means_init": frames[rows].astype(np.float64),
        "precisions_init": np.tile(precision, (K, 1)),
    }


def _peer(frames: np.ndarray, K: int, start: dict, n_iter: int) -> Peer:
    """scikit-learn adds `reg_covar` where this project has a floor: 0 makes both nothing."""
    peer = Peer(K, covariance_type="diag", reg_covar=0.0, tol=0.0, max_iter=n_iter, **start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peer.fit(frames)


def _assert_equal(ours: GaussianMixture, peer: Peer, rtol: float) -> None:
    np.testing.assert_allclose(ours.weights_, peer.weights_, rtol=rtol)
    scale = np.abs(peer.means_).mean()
    np.testing.assert_allclose(ours.means_, peer.means_, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(ours.covariances_, peer.covariances_, rtol=rtol)


def test_twenty_iterations_on_speech_equal_scikit_learns(speech):
    """The floor (1e-9) is below every variance of the fit, so it never acts, as reg_covar = 0."""
    frames, K, n_iter = speech[:9001], 64, 20
    start = _start(frames, K)
    peer = _peer(frames.astype(np.float64), K, start, n_iter)
    ours = GaussianMixture(K, tol=0.0, max_iter=n_iter, variance_floor=1e-9, **start).fit(frames)
    assert peer.covariances_.min() > 1e-6
    assert ours.n_reseeded_ == 0
    _assert_equal(ours, peer, rtol=1e-3)
    np.testing.assert_allclose(ours.lower_bounds_, peer.lower_bounds_, atol=1e-4)
    assert ours.lower_bound_ == pytest.approx(peer.lower_bound_, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_convergence_equals_scikit_learns(blobs, offset):
    frames = blobs + offset
    start = _start(frames, 3)
    peer = Peer(3, covariance_type="diag", reg_covar=0.0, **start).fit(frames)
    ours = GaussianMixture(3, variance_floor=1e-9, **start).fit(frames)
    assert ours.converged_
    assert ours.n_iter_ == peer.n_iter_
    # scikit-learn loses digits itself at an offset
    _assert_equal(ours, peer, rtol=1e-6 if offset == 0 else 1e-5)


def test_scores_and_criteria_are_scikit_learns(blobs):
    start = _start(blobs, 3)
    peer = _peer(blobs, 3, start, 5)
    ours = GaussianMixture(3, tol=0.0, max_iter=5, variance_floor=1e-9, **start).fit(blobs)
    held_out = blobs[::7] + 0.1
    np.testing.assert_allclose(ours.score_samples(held_out), peer.score_samples(held_out))
    np.testing.assert_allclose(
        ours.predict_proba(held_out), peer.predict_proba(held_out), atol=1e-9
    )
    np.testing.assert_array_equal(ours.predict(held_out), peer.predict(held_out))
    np.testing.assert_allclose(ours.precisions_, peer.precisions_)
    np.testing.assert_allclose(ours.precisions_cholesky_, peer.precisions_cholesky_)
    for name in ("score", "bic", "aic"):
        assert getattr(ours, name)(held_out) == pytest.approx(getattr(peer, name)(held_out))


def adversarial_frames(kind: str, speech: np.ndarray) -> np.ndarray:
    frames = speech[:3000].copy()
    if kind == "constant columns":
        frames[:, ::3] = -13.8
    elif kind == "duplicates":
        frames = np.repeat(frames[:60], 50, axis=0)
    elif kind == "offset":
        frames += 1e3
    return frames


@pytest.mark.parametrize("kind", ["real", "constant columns", "duplicates", "offset"])
def test_likelihood_never_falls_in_100_iterations(speech, kind):
    """Beyond rounding: 1e-9 nats a frame, a part in 1e11. Below the floor EM would not be EM."""
    frames = adversarial_frames(kind, speech)
    ours = GaussianMixture(12, tol=0.0, max_iter=100, variance_floor=1e-3).fit(frames)
    assert ours.n_iter_ == 100
    assert ours.n_reseeded_ == 0
    assert np.diff(ours.lower_bounds_).min() > -1e-9
    assert kind != "real" or ours.lower_bounds_[-1] > ours.lower_bounds_[0] + 0.5
    assert ours.covariances_.min() >= 1e-3


def test_floor_holds_every_variance(blobs):
    blobs[:, 1] = 4.0
    for floor in (1e-12, 0.1, 2.0):
        ours = GaussianMixture(5, variance_floor=floor).fit(blobs)
        assert ours.covariances_.min() >= floor
        np.testing.assert_allclose(ours.covariances_[:, 1], floor)
        np.testing.assert_allclose(ours.means_[:, 1], 4.0, rtol=1e-12)


def test_float32_at_an_offset_has_no_negative_variance():
    """A constant column at 1000 and another that hardly moves, in float32."""
    frames = torch.full((5000, 2), 1000.0)
    frames[:, 1] += 0.01 * torch.randn(5000)
    ours = GaussianMixture(4, variance_floor=1e-6).fit(frames)
    assert (ours.covariances_ >= 1e-6).all()
    assert np.isfinite(ours.lower_bounds_).all()


def test_warns_when_iterations_run_out(blobs):
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 iterations"):
        GaussianMixture(3, max_iter=2, tol=1e-12).fit(blobs)


def test_dead_component_takes_half_of_the_heaviest():
    counts = torch.tensor([10.0, 0.0, 30.0], dtype=torch.float64)
    before = Mixture(
        torch.tensor([0.25, 1e-9, 0.75], dtype=torch.float64).log(),
        torch.tensor([[1.0], [99.0], [5.0]], dtype=torch.float64),
        torch.tensor([[1.0], [1.0], [4.0]], dtype=torch.float64),
    )
    reseeds = torch.zeros(3, dtype=torch.int64)
    after, n = reseed(before, counts, reseeds)
    assert n == 1
    torch.testing.assert_close(
        after.log_weights.exp(), torch.tensor([0.25, 0.375, 0.375], dtype=torch.float64)
    )
    assert after.means.flatten().tolist() == [1.0, 6.0, 4.0]
    assert after.variances.flatten().tolist() == [1.0, 4.0, 4.0]
    assert before.means.flatten().tolist() == [1.0, 99.0, 5.0]
    reseeds[:] = MAX_RESEEDS
    assert reseed(before, counts, reseeds)[1] == 0


def test_component_without_frames_keeps_its_place():
    statistics = EMStatistics(
        torch.tensor([4.0, DEAD_FRAMES / 2], dtype=torch.float64),
        torch.tensor([[8.0], [1.0]], dtype=torch.float64),
        torch.tensor([[16.0], [9.0]], dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    previous = Mixture(*(torch.full(s, 7.0, dtype=torch.float64) for s in ((2,), (2, 1), (2, 1))))
    mixture = maximisation(statistics, previous, 0.1)
    assert mixture.means.flatten().tolist() == pytest.approx([2.0, 7.0])
    assert mixture.variances.flatten().tolist() == pytest.approx([0.1, 7.0])
    assert torch.isfinite(mixture.log_weights).all()


def test_components_placed_nowhere_are_reseeded_and_counted(blobs):
    start = _start(blobs, 6)
    start["means_init"][3:] = 1e3
    ours = GaussianMixture(6, variance_floor=1e-3, **start).fit(blobs)
    assert ours.n_reseeded_ >= 3
    assert ours.converged_
    assert (ours.weights_ * len(blobs) > 1).all()


def test_no_convergence_while_components_are_reseeded(blobs):
    """One live component gives half to one dead, two to two, four to three: then it may rest."""
    start = _start(blobs, 7)
    start["means_init"][1:] = 1e4
    ours = GaussianMixture(7, tol=1e9, **start).fit(blobs)
    assert ours.n_reseeded_ == 6
    assert ours.n_iter_ == 4
    assert ours.converged_


@pytest.mark.parametrize("n_distinct", [1, 2, 5])
def test_fewer_distinct_frames_than_components(n_distinct):
    frames = np.repeat(np.random.default_rng(0).standard_normal((n_distinct, 4)), 10, axis=0)
    ours = GaussianMixture(8, variance_floor=1e-2).fit(frames)
    assert ours.converged_
    assert np.isfinite(ours.means_).all()
    assert ours.weights_.sum() == pytest.approx(1.0)
    nearest = np.abs(frames[:, None] - ours.means_).max(-1).min(1)
    assert nearest.max() < 0.2


def test_one_frame_one_component():
    ours = GaussianMixture(1).fit(np.array([[1.0, -2.0, 1e3]]))
    np.testing.assert_allclose(ours.means_, [[1.0, -2.0, 1e3]])
    np.testing.assert_allclose(ours.covariances_, 0.1)
    assert ours.converged_


@pytest.mark.parametrize("statistics", [ops.em_statistics, kmeans._hard])
def test_long_streams_lose_nothing(blobs, statistics):
    """Sums over 3 million frames, 1e3 times as far from zero as they are wide."""
    block = torch.from_numpy(blobs).float() + 1e3
    start = _start(block.numpy(), 4)
    variances = torch.from_numpy(1.0 / start["precisions_init"])
    mixture = Mixture(torch.zeros(4), torch.from_numpy(start["means_init"]), variances)
    one = expectation([block], mixture, statistics)
    many = expectation(itertools.repeat(block, 1000), mixture, statistics)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(b, 1000 * a, rtol=1e-12, atol=0)


def test_two_processes_equal_one(blobs):
    """Threads stand for processes; statistics are summed behind a barrier."""
    barrier, shares, fitted = threading.Barrier(2, timeout=60), {}, {}

    def exchange(rank, values):
        shares[rank] = values
        barrier.wait()
        both = [shares[0], shares[1]]
        barrier.wait()
        return both

    def all_reduce(rank):
        return lambda part: EMStatistics(*(sum(p) for p in zip(*exchange(rank, part))))

    def fit(rank):
        fitted[rank] = GaussianMixture(5).fit(
            blobs[rank * 1000 : 1000 + rank * 2000],
            all_reduce=all_reduce(rank),
            start_frames=blobs,
        )

    threads = [threading.Thread(target=fit, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = GaussianMixture(5).fit(blobs)
    for rank in range(2):
        np.testing.assert_allclose(fitted[rank].means_, alone.means_, rtol=1e-9)
        np.testing.assert_allclose(fitted[rank].lower_bounds_, alone.lower_bounds_)
        assert fitted[rank].n_frames_ == 3000


def test_processes_must_share_a_start(blobs):
    with pytest.raises(InputError, match="start_frames: expected with all_reduce"):
        GaussianMixture(3).fit(blobs, all_reduce=lambda part: part)
    start = _start(blobs, 3)
    GaussianMixture(3, **start).fit(blobs, all_reduce=lambda part: part)


@pytest.mark.parametrize("kind", [GaussianMixture, KMeans])
def test_frames_to_start_from_take_the_place_of_a_sample(blobs, kind):
    """A fit that begins on them reads its own frames for the passes alone, and may have none."""
    passes = []

    def batches():
        passes.append(1)
        yield torch.from_numpy(blobs)

    own = kind(3, max_iter=2, tol=0.0).fit(batches, start_frames=blobs)
    assert len(passes) == 2
    same = kind(3, max_iter=2, tol=0.0).fit(blobs)
    name = "means_" if kind is GaussianMixture else "cluster_centers_"
    np.testing.assert_allclose(getattr(own, name), getattr(same, name))
    whole = kind(3, max_iter=1, tol=0.0)
    sums = []
    whole.fit(blobs, start_frames=blobs, all_reduce=lambda part: (sums.append(part), part)[1])
    none = kind(3, max_iter=1, tol=0.0)
    none.fit(list, start_frames=blobs, all_reduce=lambda _: sums[0])
    np.testing.assert_array_equal(getattr(none, name), getattr(whole, name))


def test_values_too_large_to_square_name_the_component():
    with pytest.raises(InputError, match=r"component \d is not finite after iteration 1"):
        GaussianMixture(2).fit(np.array([[1e200], [-1e200], [0.0]]))
