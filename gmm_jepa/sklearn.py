"""Mixtures and k-means as scikit-learn estimators, fitted by this project's engine.

They pass scikit-learn's own `check_estimator`, stand in pipelines and grid searches and pickle.
`gmm_jepa.gmm` has the same methods for streams of any length, without scikit-learn.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from gmm_jepa import gmm
from gmm_jepa.errors import require

require("sklearn", extra="sklearn")

from sklearn.base import (  # noqa: E402
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.metrics.pairwise import euclidean_distances  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

Engine = TypeVar("Engine", gmm.GaussianMixture, gmm.KMeans)


class _OnEngine(BaseEstimator):
    """An estimator that leaves the work to one of `gmm_jepa.gmm`."""

    _attributes: tuple[str, ...] = ()

    def _fit(self, X: ArrayLike, make: type[Engine], **parameters: Any) -> np.ndarray:
        """Fit an engine on the checked frames, which are returned, and take over what it found."""
        X = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        engine = make(**parameters, random_state=_seed_of(self.random_state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gmm.ConvergenceWarning)
            engine.fit(X)
        for name in self._attributes:
            setattr(self, name, getattr(engine, name))
        return X

    def _checked(self, X: ArrayLike) -> np.ndarray:
        """X as an array of the features of the fit."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=(np.float64, np.float32), reset=False)

    def _engine_of(self, X: ArrayLike, method: str) -> Any:
        checked = self._checked(X)
        return getattr(self._engine(), method)(checked)


class GaussianMixture(DensityMixin, _OnEngine):
    """Gaussian mixture with diagonal covariances, as `sklearn.mixture.GaussianMixture`.

    What is predicted follows from `weights_`, `means_` and `covariances_`, which may be set.

    One difference: variances have a floor, ``max(v, variance_floor)``, where scikit-learn adds
    ``reg_covar`` to every variance. Arithmetic is float64.

    Args:
        n_components: K.
        covariance_type: ``"diag"``, there is no other.
        tol: EM stops when the mean log-likelihood changes by less, nats per sample.
        max_iter: passes over the samples at most.
        variance_floor: least variance.
        n_init_frames: samples drawn for the start (k-means++ and a few Lloyd steps).
        weights_init: (K,) start of the weights.
        means_init: (K, D) start of the means.
        precisions_init: (K, D) start of the inverse variances.
        random_state: seed, or generator, of the start and of `sample`.

    Attributes:
        weights_, means_, covariances_, precisions_, precisions_cholesky_: (K,) and (K, D) float64.
        converged_: whether `tol` was met.
        n_iter_: passes made.
        lower_bound_, lower_bounds_: mean log-likelihood per sample, last and at every pass.
    """

    _attributes = (
        *("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"),
        *("converged_", "n_iter_", "lower_bound_", "lower_bounds_"),
    )

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: str = "diag",
        tol: float = 1e-3,
        max_iter: int = 100,
        variance_floor: float = 1e-6,
        n_init_frames: int = 65_536,
        weights_init: ArrayLike | None = None,
        means_init: ArrayLike | None = None,
        precisions_init: ArrayLike | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.max_iter = max_iter
        self.variance_floor = variance_floor
        self.n_init_frames = n_init_frames
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: None = None) -> GaussianMixture:
        """Fit by EM.

        Args:
            X: (N, D) samples, finite.
            y: not used.

        Raises:
            ValueError: a parameter or `X` makes no sense.
        """
        parameters = self.get_params(deep=False)
        del parameters["random_state"]
        self._fit(X, gmm.GaussianMixture, **parameters)
        if not self.converged_ and self.tol > 0:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X: ArrayLike, y: None = None) -> np.ndarray:
        """`fit`, then `predict` of the same samples."""
        return self.fit(X).predict(X)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Most probable component: (N, D) -> (N,) int64."""
        return self._engine_of(X, "predict")

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Posteriors: (N, D) -> (N, K), float like `X`."""
        return self._engine_of(X, "predict_proba")

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log p(x), nats: (N, D) -> (N,), float like `X`."""
        return self._engine_of(X, "score_samples")

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean log p(x), nats a sample."""
        return self._engine_of(X, "score")

    def bic(self, X: ArrayLike) -> float:
        """Bayesian information criterion; lower is better."""
        return self._engine_of(X, "bic")

    def aic(self, X: ArrayLike) -> float:
        """Akaike's information criterion; lower is better."""
        return self._engine_of(X, "aic")

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw samples (n_samples, D) and their components (n_samples,), in order."""
        check_is_fitted(self)
        engine = self._engine()
        engine.random_state = _seed_of(self.random_state)
        return engine.sample(n_samples)

    def _engine(self) -> gmm.GaussianMixture:
        """Of the present parameters, in their memory: to copy and check them costs a short call."""
        engine = gmm.GaussianMixture(len(self.weights_))
        engine.weights_ = np.asarray(self.weights_)
        engine.means_ = np.asarray(self.means_)
        engine.covariances_ = np.asarray(self.covariances_)
        engine.n_features_in_ = engine.means_.shape[1]
        return engine


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, _OnEngine):
    """k-means, as `sklearn.cluster.KMeans` with one start and Lloyd's algorithm.

    Args:
        n_clusters: K.
        tol: stops when the squared movement of all centroids together is less than `tol` times the
            mean variance of a feature.
        max_iter: passes over the samples at most.
        n_init_frames: samples drawn for the start by k-means++.
        random_state: seed, or generator, of the start.

    Attributes:
        cluster_centers_: (K, D) float64.
        labels_: (N,) cluster of every sample of the fit.
        inertia_: sum of squared distances to the nearest centroids.
        n_iter_: passes made.
    """

    _attributes = ("cluster_centers_", "n_iter_")

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        tol: float = 1e-4,
        max_iter: int = 300,
        n_init_frames: int = 65_536,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.tol = tol
        self.max_iter = max_iter
        self.n_init_frames = n_init_frames
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: None = None) -> KMeans:
        """Fit.

        Args:
            X: (N, D) samples, finite.
            y: not used.

        Raises:
            ValueError: a parameter or `X` makes no sense.
        """
        parameters = self.get_params(deep=False)
        del parameters["random_state"]
        X = self._fit(X, gmm.KMeans, **parameters)
        engine = self._engine()
        self.labels_, self.inertia_ = engine.predict(X), -engine.score(X)
        self._n_features_out = self.n_clusters
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Nearest centroid: (N, D) -> (N,) int64."""
        return self._engine_of(X, "predict")

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Distances to the centroids: (N, D) -> (N, K)."""
        checked = self._checked(X)
        return euclidean_distances(checked, self.cluster_centers_.astype(checked.dtype))

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Minus the sum of squared distances to the nearest centroids."""
        return self._engine_of(X, "score")

    def _engine(self) -> gmm.KMeans:
        """Of the present centroids."""
        engine = gmm.KMeans(len(self.cluster_centers_))
        engine.set_centers(self.cluster_centers_, np.zeros(len(self.cluster_centers_)))
        return engine


def _seed_of(random_state: int | np.random.RandomState | None) -> int:
    return int(check_random_state(random_state).randint(2**31 - 1))
