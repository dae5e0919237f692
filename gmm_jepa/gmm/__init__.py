"""Gaussian mixtures: fitted by EM on streams of any length, kept in files, asked for posteriors."""

from gmm_jepa.gmm.estimator import ConvergenceWarning, GaussianMixture
from gmm_jepa.gmm.files import (
    load_kmeans,
    load_mixture,
    load_published_kmeans,
    load_published_mixture,
    save_kmeans,
    save_mixture,
)
from gmm_jepa.gmm.kmeans import KMeans
from gmm_jepa.gmm.posterior import gmm_posterior
from gmm_jepa.gmm.sklearn_protocol import NotFittedError

__all__ = [
    "ConvergenceWarning",
    "GaussianMixture",
    "KMeans",
    "NotFittedError",
    "gmm_posterior",
    "load_kmeans",
    "load_mixture",
    "load_published_kmeans",
    "load_published_mixture",
    "save_kmeans",
    "save_mixture",
]
