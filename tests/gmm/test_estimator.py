"""The estimator's face: kinds in and out, parameters, scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gmm_jepa import GaussianMixture, InputError, gmm_posterior
from gmm_jepa.gmm import NotFittedError
from gmm_jepa.ops import Mixture


def test_finds_the_blobs(blobs):
    fitted = GaussianMixture(3).fit(blobs)
    order = fitted.weights_.argsort()[::-1]
    np.testing.assert_allclose(fitted.weights_[order], [0.5, 0.3, 0.2], atol=1e-3)
    np.testing.assert_allclose(fitted.means_[order][0], [0, 0, 5], atol=0.15)
    np.testing.assert_allclose(fitted.covariances_[order][0], [1, 0.25, 2.25], rtol=0.15)
    assert fitted.converged_
    assert fitted.n_frames_ == 3000
    assert fitted.n_features_in_ == 3
    assert len(fitted.lower_bounds_) == fitted.n_iter_


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_start_is_as_good_as_scikit_learns(speech, seed):
    """Ten iterations from our start reach what ten from scikit-learn's k-means reach."""
    import warnings

    from sklearn.mixture import GaussianMixture as Peer

    frames = speech[:6000]
    ours = GaussianMixture(32, tol=0.0, max_iter=10, variance_floor=1e-3, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = Peer(
            32, covariance_type="diag", reg_covar=1e-3, tol=0.0, max_iter=10, random_state=seed
        ).fit(frames)
    assert ours.fit(frames).score(frames) > peer.score(frames) - 1.0


def test_same_seed_same_bits(blobs):
    first, second = (GaussianMixture(4, random_state=5).fit(blobs) for _ in range(2))
    assert (first.means_ == second.means_).all()
    assert (first.covariances_ == second.covariances_).all()
    assert first.lower_bounds_ == second.lower_bounds_


def test_kind_in_kind_out(blobs):
    fitted = GaussianMixture(3).fit(torch.from_numpy(blobs))
    methods = (fitted.predict, fitted.predict_proba, fitted.score_samples)
    for method in methods:
        from_tensor, from_array = method(torch.from_numpy(blobs)), method(blobs)
        assert isinstance(from_tensor, torch.Tensor)
        assert isinstance(from_array, np.ndarray)
        np.testing.assert_array_equal(from_tensor.numpy(), from_array)
    assert fitted.predict_proba(blobs.astype(np.float32)).dtype == np.float32
    assert fitted.predict_proba(blobs).dtype == np.float64
    assert fitted.predict(blobs).dtype == np.int64
    for method in methods:
        assert len(method(blobs[:0])) == 0


def test_mixture_feeds_the_ops(blobs):
    fitted = GaussianMixture(3).fit(blobs)
    mixture = fitted.mixture()
    assert isinstance(mixture, Mixture)
    assert mixture.means.dtype == torch.float32
    frames = blobs.astype(np.float32)
    expected = fitted.predict_proba(frames)
    for given in (mixture, fitted):
        got = gmm_posterior(frames, given)
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    tensor = torch.from_numpy(frames).requires_grad_()
    gmm_posterior(tensor, fitted, precision="exact")[:, 0].sum().backward()
    assert torch.isfinite(tensor.grad).all()


def test_partial_starts_are_kept(blobs):
    means = np.array([[0.0, 0, 5], [8, -3, 0], [-6, 4, 1]])
    fitted = GaussianMixture(3, means_init=means).fit(blobs)
    np.testing.assert_allclose(fitted.means_, means, atol=0.2)
    seen = GaussianMixture(3, weights_init=[0.2, 0.3, 0.5], max_iter=1, tol=0.0).fit(blobs)
    assert seen.weights_.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_components": 0}, "n_components: expected a whole number above 0, got 0"),
        ({"n_components": 2.0}, "n_components"),
        ({"max_iter": 0}, "max_iter"),
        ({"n_init_frames": 2}, "n_init_frames: expected at least n_components = 3, got 2"),
        ({"tol": -1.0}, "tol: expected 0 or more"),
        ({"variance_floor": 0.0}, "variance_floor: expected a finite number above 0"),
        ({"variance_floor": float("nan")}, "variance_floor"),
        ({"covariance_type": "full"}, "covariance_type: expected \"diag\", got 'full'"),
        ({"weights_init": [0.5, 0.5]}, r"weights_init: expected \(3,\), got \(2,\)"),
        ({"weights_init": [0.5, 0.5, 0.5]}, "weights_init: expected values of 0 or more that sum"),
        ({"means_init": np.zeros((3, 4))}, "means_init: expected 3 features, got 4"),
        ({"means_init": np.full((3, 3), np.nan)}, "means_init: expected finite values"),
        ({"precisions_init": np.zeros((3, 3))}, "precisions_init: expected values above 0"),
    ],
)
def test_nonsense_parameters_are_refused_at_fit(blobs, values, message):
    gm = GaussianMixture(**{"n_components": 3, **values})
    with pytest.raises(InputError, match=message):
        gm.fit(blobs)


def test_use_before_fit_is_refused():
    for method in ("predict", "predict_proba", "score_samples", "score", "bic", "aic"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(GaussianMixture(2), method)(np.zeros((2, 2)))
    with pytest.raises(NotFittedError):
        GaussianMixture(2).mixture()
    with pytest.raises(NotFittedError):
        GaussianMixture(2).sample()


def test_another_number_of_features_is_refused(blobs):
    fitted = GaussianMixture(3).fit(blobs)
    with pytest.raises(InputError, match="X has 2 features, but GaussianMixture is expecting 3"):
        fitted.predict(blobs[:, :2])


def test_sample_is_drawn_from_the_mixture(blobs):
    fitted = GaussianMixture(3).fit(blobs)
    frames, labels = fitted.sample(20_000)
    assert frames.shape == (20_000, 3)
    assert (np.diff(labels) >= 0).all()
    for k in range(3):
        drawn = frames[labels == k]
        assert len(drawn) / 20_000 == pytest.approx(fitted.weights_[k], abs=0.02)
        np.testing.assert_allclose(drawn.mean(0), fitted.means_[k], atol=0.1)
        np.testing.assert_allclose(drawn.var(0), fitted.covariances_[k], rtol=0.1)
    with pytest.raises(InputError, match="n_samples"):
        fitted.sample(0)


def test_callback_sees_every_iteration(blobs):
    seen = []
    fitted = GaussianMixture(3).fit(blobs, on_iteration=lambda i, value: seen.append((i, value)))
    assert seen == list(enumerate(fitted.lower_bounds_, start=1))


def test_parameters_by_name():
    gm = GaussianMixture(8, tol=0.5)
    assert gm.get_params()["tol"] == 0.5
    assert gm.set_params(n_components=4) is gm
    assert repr(gm) == "GaussianMixture(n_components=4, tol=0.5)"
    with pytest.raises(InputError, match="Invalid parameter 'reg_covar'"):
        gm.set_params(reg_covar=1.0)


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks():
    from sklearn.base import clone
    from sklearn.utils.estimator_checks import check_estimator

    results = check_estimator(
        GaussianMixture(1, variance_floor=1e-6),
        expected_failed_checks={
            "check_estimators_unfitted": "NotFittedError cannot be scikit-learn's without it",
        },
        on_fail="raise",
    )
    assert sum(result["status"] == "passed" for result in results) >= 35
    assert clone(GaussianMixture(7, tol=0.1)).get_params()["n_components"] == 7


def test_sample_is_of_the_components_that_were_fitted(blobs):
    model = GaussianMixture(3, random_state=0).fit(blobs)
    expected = model.sample(10)[0]
    np.testing.assert_array_equal(model.set_params(n_components=2).sample(10)[0], expected)


def test_a_default_device_is_not_the_device_of_arrays(blobs):
    model = GaussianMixture(3, random_state=0).fit(blobs)
    expected = model.predict_proba(np.asarray(blobs))
    with torch.device("meta"):
        again = GaussianMixture(3, random_state=0).fit(blobs)
        np.testing.assert_array_equal(again.predict_proba(np.asarray(blobs)), expected)


def test_a_mixture_from_elsewhere(blobs):
    from sklearn.mixture import GaussianMixture as Peer

    peer = Peer(3, covariance_type="diag", random_state=0).fit(blobs)
    parameters = (peer.weights_, peer.means_, peer.covariances_)
    ours = GaussianMixture.from_parameters(*parameters)
    frames = np.asarray(blobs, np.float64)
    np.testing.assert_allclose(ours.predict_proba(frames), peer.predict_proba(frames), atol=1e-6)
    np.testing.assert_allclose(ours.score_samples(frames), peer.score_samples(frames), rtol=1e-6)
    for name, given in zip(("weights_", "means_", "covariances_"), parameters):
        np.testing.assert_array_equal(getattr(ours, name), given)
    weights, means, variances = parameters
    with pytest.raises(InputError, match=r"got \(3,\), \(3, \d+\) and \(3,\)"):
        GaussianMixture.from_parameters(weights, means, weights)
    for wrong in ((-weights, means, variances), (weights, means, 0.0 * variances)):
        with pytest.raises(InputError, match="expected 0 or more, and above 0"):
            GaussianMixture.from_parameters(*wrong)
    with pytest.raises(InputError, match="finite"):
        GaussianMixture.from_parameters(weights, np.nan * means, variances)
    for share in (0.0, 2.0):
        with pytest.raises(InputError, match="weights: expected a sum of 1, got"):
            GaussianMixture.from_parameters(share * weights, means, variances)
    rounded = np.asarray(weights, np.float16)
    assert GaussianMixture.from_parameters(rounded, means, variances).predict(frames).shape


def test_a_generator_is_no_seed(blobs):
    for wrong in (np.random.RandomState(0), -1, 0.5):
        with pytest.raises(InputError, match=r"random_state: expected a whole number.*sklearn"):
            GaussianMixture(3, random_state=wrong).fit(blobs)
