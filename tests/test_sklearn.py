"""The scikit-learn estimators: scikit-learn's own checks, and its figures on equal data."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn.cluster
import sklearn.mixture
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from gmm_jepa.sklearn import GaussianMixture, KMeans

BLOBS, TRUTH = make_blobs(600, n_features=5, centers=4, random_state=3)


@parametrize_with_checks([GaussianMixture(random_state=0), KMeans(random_state=0)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_mixture_is_scikit_learns_mixture(dtype):
    X = BLOBS.astype(dtype)
    means = BLOBS[:4]
    given = {"means_init": means, "weights_init": np.full(4, 0.25)}
    given["precisions_init"] = np.ones((4, 5))
    theirs = sklearn.mixture.GaussianMixture(
        4, covariance_type="diag", reg_covar=0.0, tol=0.0, max_iter=5, **given
    )
    ours = GaussianMixture(4, variance_floor=1e-9, tol=0.0, max_iter=5, **given)
    with pytest.warns(ConvergenceWarning):
        theirs.fit(BLOBS)
    ours.fit(X)
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=2e-4)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(BLOBS), atol=1e-4)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(BLOBS), rtol=1e-4)
    assert ours.bic(X) == pytest.approx(theirs.bic(BLOBS), rel=1e-4)
    assert ours.aic(X) == pytest.approx(theirs.aic(BLOBS), rel=1e-4)
    assert ours.score(X) == pytest.approx(theirs.score(BLOBS), rel=1e-4)
    assert (ours.predict(X) == theirs.predict(BLOBS)).all()
    samples, labels = ours.sample(10)
    assert samples.shape == (10, 5)
    assert labels.tolist() == sorted(labels)


def test_k_means_is_scikit_learns_k_means():
    ours = KMeans(4, random_state=0).fit(BLOBS)
    theirs = sklearn.cluster.KMeans(4, n_init=10, random_state=0).fit(BLOBS)
    assert adjusted_rand_score(ours.labels_, theirs.labels_) == 1.0
    assert adjusted_rand_score(ours.labels_, TRUTH) == 1.0
    assert ours.inertia_ == pytest.approx(theirs.inertia_)
    assert ours.score(BLOBS) == pytest.approx(theirs.score(BLOBS))
    assert ours.transform(BLOBS).argmin(1).tolist() == ours.predict(BLOBS).tolist()
    assert list(ours.get_feature_names_out()) == [f"kmeans{i}" for i in range(4)]


def test_grid_search_over_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), GaussianMixture(random_state=0))
    search = GridSearchCV(pipeline, {"gaussianmixture__n_components": [1, 4]}, cv=3)
    assert search.fit(BLOBS).best_params_ == {"gaussianmixture__n_components": 4}


def test_pickles_whole():
    mixture = GaussianMixture(4, random_state=0).fit(BLOBS)
    copy = pickle.loads(pickle.dumps(mixture))
    assert (copy.predict_proba(BLOBS) == mixture.predict_proba(BLOBS)).all()


def test_says_that_it_did_not_converge():
    with pytest.warns(ConvergenceWarning, match="1 iterations"):
        GaussianMixture(4, max_iter=1, tol=1e-9, random_state=0).fit(BLOBS)


def test_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="covariance_type"):
        GaussianMixture(2, covariance_type="full").fit(BLOBS)


def test_predictions_follow_the_parameters():
    X = np.random.default_rng(0).standard_normal((200, 3))
    fitted = GaussianMixture(4, random_state=0).fit(X)
    expected = fitted.predict_proba(X)
    given = GaussianMixture(4, random_state=0)  # as scikit-learn's are made of parameters
    given.weights_, given.means_ = fitted.weights_, fitted.means_
    given.covariances_ = fitted.covariances_
    np.testing.assert_array_equal(given.predict_proba(X), expected)
    np.testing.assert_array_equal(given.sample(5)[0], fitted.sample(5)[0])
    for name in ("weights_", "means_", "covariances_"):
        setattr(fitted, name, getattr(fitted, name)[::-1].copy())
    np.testing.assert_allclose(fitted.predict_proba(X)[:, ::-1], expected, rtol=0, atol=1e-12)
    clusters = KMeans(3, random_state=0).fit(X)
    labels = clusters.predict(X)
    clusters.cluster_centers_ = clusters.cluster_centers_[::-1].copy()
    np.testing.assert_array_equal(2 - clusters.predict(X), labels)
