"""k-means by Lloyd's algorithm on streams of any length, from the mixture's own parts."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec
from gmm_jepa.gmm.em import AllReduce, OnIteration, expectation, maximisation, reseed
from gmm_jepa.gmm.seeding import first_centroids, generators, start_sample
from gmm_jepa.gmm.sklearn_protocol import SklearnProtocol
from gmm_jepa.gmm.stream import Batches, Frames, FrameStream
from gmm_jepa.ops import EMStatistics, Mixture, kmeans_assign, kmeans_statistics


class KMeans(SklearnProtocol):
    """k-means with scikit-learn's names, fitted on arrays or on streams.

    Starts from k-means++ on a uniform sample; a pass over the frames sums counts and means in
    float64, whatever their number. A cluster that loses all its frames takes half of a heavy one.

    Args:
        n_clusters: K.
        tol: stops when the squared movement of all centroids together is less than `tol` times the
            mean variance of a feature.
        max_iter: passes over the frames at most.
        n_init_frames: frames sampled uniformly from the stream to start from.
        random_state: seed of the start; None draws one.

    Attributes:
        cluster_centers_: (K, D) float64 array.
        counts_: (K,) float64, frames of each cluster in the last pass.
        inertia_: sum of squared distances in the last pass.
        n_iter_: passes made.
        n_features_in_: D.
        front_end_: the `LogMelSpec` of the features if the file it was loaded from names one.
    """

    _estimator_type = "clusterer"

    def __init__(
        self,
        n_clusters: int = 1024,
        *,
        tol: float = 1e-4,
        max_iter: int = 100,
        n_init_frames: int = 65_536,
        random_state: int | None = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.tol = tol
        self.max_iter = max_iter
        self.n_init_frames = n_init_frames
        self.random_state = random_state

    def fit(
        self,
        X: Frames | Batches,
        y: None = None,
        *,
        on_iteration: OnIteration | None = None,
        all_reduce: AllReduce | None = None,
        start_frames: Frames | None = None,
    ) -> KMeans:
        """Fit; every iteration is one pass over `X`.

        Arguments and errors as in `GaussianMixture.fit`; `on_iteration` is called with the
        iteration and the mean squared distance.
        """
        self._check_parameters(all_reduce, start_frames)
        stream = FrameStream(X)
        current = self._start(stream, start_frames)
        reseeds = torch.zeros(self.n_clusters, dtype=torch.int64, device="cpu")
        for iteration in range(1, self.max_iter + 1):
            sums = expectation(stream, current, _hard)
            if all_reduce is not None:
                sums = EMStatistics(*all_reduce(sums))
            n_frames = float(sums.counts.sum())
            if not bool(torch.isfinite(sums.second).all()):
                raise InputError("X: values are too large to square; rescale the frames")
            moved = maximisation(sums, current, variance_floor=0.0)
            moved, n_reseeded = reseed(moved, sums.counts, reseeds)
            shift = float((moved.means - current.means).square().sum())
            current = moved
            self.inertia_, self.n_iter_ = -float(sums.log_likelihood), iteration
            if on_iteration is not None:
                on_iteration(iteration, self.inertia_ / n_frames)
            if shift <= self.tol * _mean_variance(sums) and not n_reseeded:
                break
        self.set_centers(current.means.numpy(), sums.counts.numpy())
        return self

    def predict(self, X: Frames) -> Frames:
        """Nearest centroid of every frame, the first of equals: (N, D) -> (N,) int64."""
        labels = self._assigned(X)[0]
        return labels if isinstance(X, Tensor) else labels.numpy()

    def score(self, X: Frames, y: None = None) -> float:
        """Minus the sum of squared distances to the nearest centroids."""
        return -float(self._assigned(X)[1].sum(dtype=torch.float64))

    def save(self, path: str | PathLike[str], *, front_end: LogMelSpec | None = None) -> None:
        """Write to a safetensors file, see `gmm_jepa.gmm.files.save_kmeans`."""
        from gmm_jepa.gmm.files import save_kmeans

        save_kmeans(path, self, front_end)

    @classmethod
    def load(cls, path: str | PathLike[str], *, front_end: LogMelSpec | None = None) -> KMeans:
        """Read from a safetensors file, see `gmm_jepa.gmm.files.load_kmeans`."""
        from gmm_jepa.gmm.files import load_kmeans

        return load_kmeans(path, front_end=front_end)

    def set_centers(self, centers: np.ndarray, counts: np.ndarray) -> None:
        """Take over centroids (K, D), and how many frames each has (K,)."""
        self.cluster_centers_ = np.array(centers, dtype=np.float64)
        self.counts_ = np.array(counts, dtype=np.float64)
        self.n_features_in_ = self.cluster_centers_.shape[1]
        self.front_end_: LogMelSpec | None = None

    def _start(self, stream: FrameStream, start_frames: Frames | None) -> Mixture:
        sampling, choosing = generators(self.random_state)
        sample = start_sample(stream, self.n_init_frames, sampling, start_frames)
        if len(sample) < self.n_clusters:
            raise InputError(f"n_samples={len(sample)} should be >= n_clusters={self.n_clusters}.")
        centroids = first_centroids(sample, self.n_clusters, choosing)
        spread = sample.double().var(0, correction=0).expand_as(centroids)
        return Mixture(centroids.new_zeros(self.n_clusters, dtype=torch.float64), centroids, spread)

    def _assigned(self, X: Frames) -> tuple[Tensor, Tensor]:
        frames = self._checked(X)
        centers = torch.as_tensor(self.cluster_centers_, device=frames.device)
        return kmeans_assign(frames, centers)

    def _check_parameters(self, all_reduce: AllReduce | None, start_frames: Frames | None) -> None:
        self._check_sizes("n_clusters")
        if not self.tol >= 0.0:
            raise InputError(f"tol: expected 0 or more, got {self.tol!r}")
        if all_reduce is not None and (start_frames is None or self.random_state is None):
            raise InputError(
                "start_frames and random_state: expected with all_reduce, so that all processes "
                "start alike"
            )


def _hard(frames: Tensor, mixture: Mixture) -> EMStatistics:
    """Statistics with all of a frame on its nearest centroid."""
    return kmeans_statistics(frames, mixture.means)


def _mean_variance(sums: EMStatistics) -> float:
    """Variance of a feature over all frames, averaged over the features."""
    n = sums.counts.sum()
    mean = sums.first.sum(0) / n
    return float((sums.second.sum(0) / n - mean.square()).clamp_min(0.0).mean())
