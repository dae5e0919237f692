"""`GaussianMixture`: scikit-learn's names and meanings, on streams of any length."""

from __future__ import annotations

import math
import warnings
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.gmm.em import AllReduce, EMResult, OnIteration, expectation_maximisation
from gmm_jepa.gmm.seeding import generators, start_from, start_sample
from gmm_jepa.gmm.sklearn_protocol import SklearnProtocol
from gmm_jepa.gmm.stream import Batches, Frames, FrameStream
from gmm_jepa.ops import Mixture, gmm_log_likelihood, gmm_posterior, gmm_topk
from gmm_jepa.ops.packed import mixture_on

_WEIGHTS_OFF = 1e-3
"""How far from 1 the sum of given weights may be: as far as float16 rounds them."""


class ConvergenceWarning(UserWarning):
    """EM stopped at `max_iter` before the likelihood came to rest."""


class GaussianMixture(SklearnProtocol):
    """Gaussian mixture with diagonal covariances, fitted by EM on arrays or on streams.

    Parameters, methods and attributes mean what they mean in
    ``sklearn.mixture.GaussianMixture(covariance_type="diag")``, with one difference: variances
    have a floor (``max(v, variance_floor)``) where scikit-learn adds ``reg_covar``.

    A fit holds O(n_components x D) statistics, one batch, and a sample of `n_init_frames` frames
    for the start, whatever the number of frames. Arithmetic is float64. Components that lose all
    their frames take over half of a heavy one.

    Args:
        n_components: K.
        covariance_type: ``"diag"``, there is no other.
        tol: EM stops when the mean log-likelihood changes by less, nats per frame.
        max_iter: passes over the frames at most.
        variance_floor: least variance, in squared units of the features. The default suits
            log-mel features (natural log).
        n_init_frames: frames sampled uniformly from the stream to start from (k-means++ and a
            few Lloyd steps).
        weights_init: (K,) start of the weights.
        means_init: (K, D) start of the means, instead of k-means.
        precisions_init: (K, D) start of the inverse variances.
        random_state: seed of the start and of `sample`; None draws one.

    Attributes:
        weights_, means_, covariances_: (K,), (K, D), (K, D) float64 arrays.
        precisions_, precisions_cholesky_: (K, D) 1 / variance and its root.
        converged_: whether `tol` was met.
        n_iter_: passes made, or mini-batches if `one_pass_`.
        lower_bound_, lower_bounds_: mean log-likelihood per frame, last and at each of these.
        one_pass_: whether it was fitted in one pass (`gmm-jepa fit-gmm --method stepwise`).
        n_reseeded_: components that were given a new place.
        n_features_in_: D.
        n_frames_: frames of the fit, over all processes.
        front_end_: the `LogMelSpec` of the features if the file it was loaded from names one.
    """

    def __init__(
        self,
        n_components: int = 1024,
        *,
        covariance_type: str = "diag",
        tol: float = 1e-3,
        max_iter: int = 100,
        variance_floor: float = 0.1,
        n_init_frames: int = 65_536,
        weights_init: Frames | None = None,
        means_init: Frames | None = None,
        precisions_init: Frames | None = None,
        random_state: int | None = 0,
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

    @classmethod
    def from_parameters(
        cls, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
    ) -> GaussianMixture:
        """A mixture that was fitted elsewhere, such as by scikit-learn with ``"diag"``.

        Args:
            weights: (K,), 0 or more, with a sum of 1 within 1e-3.
            means: (K, D).
            covariances: (K, D) variances, above 0.

        Raises:
            InputError: shapes disagree, or a value is out of range.
        """
        w, m, v = (np.array(a, dtype=np.float64) for a in (weights, means, covariances))
        if m.ndim != 2 or w.shape != m.shape[:1] or v.shape != m.shape:
            raise InputError(
                "weights, means, covariances: expected (K,), (K, D) and (K, D), got "
                f"{w.shape}, {m.shape} and {v.shape}"
            )
        if not (np.isfinite(m).all() and np.isfinite(v).all() and np.isfinite(w).all()):
            raise InputError("weights, means, covariances: expected finite values")
        if (w < 0.0).any() or (v <= 0.0).any():
            raise InputError("weights, covariances: expected 0 or more, and above 0")
        if abs(w.sum() - 1.0) > _WEIGHTS_OFF:
            raise InputError(f"weights: expected a sum of 1, got {w.sum():.6g}")
        mixture = cls(len(w))
        with np.errstate(divide="ignore"):
            mixture._set_mixture(Mixture(*map(torch.from_numpy, (np.log(w), m, v))))
        mixture.weights_ = w  # as given, not through a logarithm and back
        return mixture

    def fit(
        self,
        X: Frames | Batches,
        y: None = None,
        *,
        on_iteration: OnIteration | None = None,
        all_reduce: AllReduce | None = None,
        start_frames: Frames | None = None,
    ) -> GaussianMixture:
        """Fit by EM; every iteration is one pass over `X`.

        Args:
            X: (N, D) array or tensor, or batches (n, D) that can be iterated more than once: a
                list, a DataLoader, any object with ``__iter__``, or a function that returns an
                iterator. NaN and infinity are refused by row number.
            y: not used, as in scikit-learn.
            on_iteration: called as ``(iteration, mean log-likelihood)`` after every pass.
            all_reduce: sums `EMStatistics` over processes that hold different frames.
            start_frames: (n, D) to start from in the place of a sample of `X`. Needed with
                `all_reduce`, the same in every process, where not all three `*_init` are given.

        Raises:
            InputError: a parameter or `X` makes no sense, or there are fewer frames than
                components.
        """
        self._check_parameters()
        stream = FrameStream(X)
        start = self._start(stream, all_reduce, start_frames)
        result = expectation_maximisation(
            stream,
            start,
            tol=self.tol,
            max_iter=self.max_iter,
            variance_floor=self.variance_floor,
            on_iteration=on_iteration,
            all_reduce=all_reduce,
        )
        self.set_result(result)
        if not self.converged_ and self.tol > 0.0:
            warnings.warn(
                f"EM did not converge in {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: Frames) -> Frames:
        """Most probable component of every frame: (N, D) -> (N,) int64."""
        frames, mixture = self._frames(X)
        return _like(X, gmm_topk(frames, mixture, 1)[1][:, 0])

    def predict_proba(self, X: Frames) -> Frames:
        """Posterior of every component: (N, D) -> (N, K), exact precision, float like `X`."""
        frames, mixture = self._frames(X)
        return _like(X, gmm_posterior(frames, mixture, precision="exact"))

    def score_samples(self, X: Frames) -> Frames:
        """log p(x) of every frame, nats: (N, D) -> (N,), float like `X`."""
        frames, mixture = self._frames(X)
        return _like(X, gmm_log_likelihood(frames, mixture))

    def score(self, X: Frames | Batches, y: None = None) -> float:
        """Mean log p(x) per frame, nats; `X` as in `fit`."""
        total, n_frames = self._total_log_likelihood(X)
        return total / n_frames

    def bic(self, X: Frames | Batches) -> float:
        """Bayesian information criterion, lower is better; `X` as in `fit`."""
        total, n_frames = self._total_log_likelihood(X)
        return -2.0 * total + self._n_parameters() * math.log(n_frames)

    def aic(self, X: Frames | Batches) -> float:
        """Akaike's information criterion, lower is better; `X` as in `fit`."""
        return -2.0 * self._total_log_likelihood(X)[0] + 2.0 * self._n_parameters()

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw frames: (n_samples, D) float64 and their components (n_samples,), in order."""
        self.check_fitted()
        if n_samples < 1:
            raise InputError(f"n_samples: expected 1 or more, got {n_samples}")
        random = np.random.default_rng(self.random_state)
        counts = random.multinomial(n_samples, self.weights_ / self.weights_.sum())
        labels = np.repeat(np.arange(len(counts)), counts)
        noise = random.standard_normal((n_samples, self.n_features_in_))
        return self.means_[labels] + noise * np.sqrt(self.covariances_[labels]), labels

    def mixture(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Mixture:
        """The fitted parameters as tensors for the ops."""
        self.check_fitted()
        device = torch.device("cpu" if device is None else device)
        return Mixture(*(torch.tensor(a, dtype=dtype, device=device) for a in self._arrays()))

    def mixture_on(self, device: torch.device) -> Mixture:
        """`mixture` in float64 for calls in a row: in the arrays' own memory, or kept on a GPU."""
        self.check_fitted()
        arrays = (np.require(a, np.float64, "CW") for a in self._arrays())
        return mixture_on(Mixture(*map(torch.from_numpy, arrays)), device)

    @property
    def precisions_(self) -> np.ndarray:
        """(K, D) one over the variances."""
        self.check_fitted()
        return 1.0 / self.covariances_

    @property
    def precisions_cholesky_(self) -> np.ndarray:
        """(K, D) root of the precisions."""
        return np.sqrt(self.precisions_)

    def save(self, path: str | PathLike[str], *, front_end: LogMelSpec | None = None) -> None:
        """Write to a safetensors file, see `gmm_jepa.gmm.files.save_mixture`."""
        from gmm_jepa.gmm.files import save_mixture

        self.check_fitted()
        save_mixture(path, self, front_end if front_end is not None else self.front_end_)

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, front_end: LogMelSpec | None = None
    ) -> GaussianMixture:
        """Read from a safetensors file, see `gmm_jepa.gmm.files.load_mixture`."""
        from gmm_jepa.gmm.files import load_mixture

        return load_mixture(path, front_end=front_end)

    def set_result(self, result: EMResult) -> None:
        """Take over where EM ended, as `fit` does."""
        self._set_mixture(result.mixture)
        self._set_course(result)

    def _set_mixture(self, mixture: Mixture) -> None:
        """Take over parameters; what a fit says about its course is reset."""
        log_weights, means, variances = (p.detach().double().cpu().numpy() for p in mixture)
        self.weights_ = np.exp(log_weights)
        self.means_ = means
        self.covariances_ = variances
        self.n_features_in_ = means.shape[1]
        self.front_end_: LogMelSpec | None = None
        self._set_course(EMResult(mixture))

    def _set_course(self, result: EMResult) -> None:
        self.lower_bounds_ = list(result.lower_bounds)
        self.lower_bound_ = self.lower_bounds_[-1] if self.lower_bounds_ else -math.inf
        self.n_iter_ = len(self.lower_bounds_)
        self.one_pass_ = result.one_pass
        self.converged_ = result.converged
        self.n_reseeded_ = result.n_reseeded
        self.n_frames_ = result.n_frames

    def _check_parameters(self) -> None:
        self._check_sizes("n_components")
        if self.covariance_type != "diag":
            raise InputError(f'covariance_type: expected "diag", got {self.covariance_type!r}')
        if not self.tol >= 0.0:
            raise InputError(f"tol: expected 0 or more, got {self.tol!r}")
        if not (self.variance_floor > 0.0 and math.isfinite(self.variance_floor)):
            raise InputError(
                f"variance_floor: expected a finite number above 0, got {self.variance_floor!r}"
            )

    def _start(
        self,
        stream: FrameStream,
        all_reduce: AllReduce | None,
        start_frames: Frames | None,
    ) -> Mixture:
        weights, means, precisions = self._given_start()
        if weights is not None and means is not None and precisions is not None:
            return Mixture(weights.log(), means, self._floored(precisions))
        if all_reduce is not None and start_frames is None:
            raise InputError(
                "start_frames: expected with all_reduce, so that all processes start alike; "
                "or give weights_init, means_init and precisions_init"
            )
        if all_reduce is not None and self.random_state is None:
            raise InputError("random_state: expected a number with all_reduce, got None")
        sampling, choosing = generators(self.random_state)
        sample = start_sample(stream, self.n_init_frames, sampling, start_frames)
        n_samples, n_features = sample.shape
        if n_samples < self.n_components:
            raise InputError(
                "Expected n_samples >= n_components but got "
                f"n_components = {self.n_components}, n_samples = {n_samples}"
            )
        for name, given in (("means_init", means), ("precisions_init", precisions)):
            if given is not None and given.shape[1] != n_features:
                raise InputError(f"{name}: expected {n_features} features, got {given.shape[1]}")
        start = start_from(sample, self.n_components, self.variance_floor, choosing, means)
        return Mixture(
            start.log_weights if weights is None else weights.log(),
            start.means if means is None else means,
            start.variances if precisions is None else self._floored(precisions),
        )

    def _given_start(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Checked `weights_init`, `means_init`, `precisions_init` as float64 tensors."""
        K = self.n_components
        given: dict[str, Tensor | None] = {}
        for name, ndim in (("weights_init", 1), ("means_init", 2), ("precisions_init", 2)):
            value = getattr(self, name)
            tensor = None if value is None else torch.as_tensor(value).detach().double().cpu()
            given[name] = tensor
            if tensor is None:
                continue
            if tensor.ndim != ndim or tensor.shape[0] != K:
                shape = f"({K},)" if ndim == 1 else f"({K}, D)"
                raise InputError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name}: expected finite values")
        weights, means, precisions = given.values()
        if weights is not None and (bool((weights < 0).any()) or abs(weights.sum() - 1.0) > 1e-6):
            raise InputError("weights_init: expected values of 0 or more that sum to 1")
        if precisions is not None and bool((precisions <= 0).any()):
            raise InputError("precisions_init: expected values above 0")
        if means is not None and precisions is not None and means.shape != precisions.shape:
            raise InputError(
                f"precisions_init: expected {tuple(means.shape)} as means_init, "
                f"got {tuple(precisions.shape)}"
            )
        return weights, means, precisions

    def _floored(self, precisions: Tensor) -> Tensor:
        return precisions.reciprocal().clamp_min(self.variance_floor)

    def _n_parameters(self) -> int:
        K, D = self.means_.shape
        return 2 * K * D + K - 1

    def _frames(self, X: Frames) -> tuple[Tensor, Mixture]:
        """Checked (N, D) frames and the mixture beside them on their device."""
        frames = self._checked(X)
        return frames, self.mixture_on(frames.device)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fields of a `Mixture`."""
        with np.errstate(divide="ignore"):
            return np.log(self.weights_), self.means_, self.covariances_

    def _total_log_likelihood(self, X: Frames | Batches) -> tuple[float, int]:
        """Sum of log p(x), nats, and the number of frames."""
        total, n_frames = 0.0, 0
        for batch in FrameStream(X):
            frames, mixture = self._frames(batch)
            total += float(gmm_log_likelihood(frames, mixture).sum(dtype=torch.float64))
            n_frames += frames.shape[0]
        if not n_frames:
            raise InputError("X: Found array with 0 sample(s) while a minimum of 1 is required.")
        return total, n_frames


def _like(X: object, result: Tensor) -> Frames:
    """A tensor for a tensor, an array for anything else."""
    return result if isinstance(X, Tensor) else result.numpy()
