"""GMM-JEPA: pretrain speech encoders with GMM-anchored joint-embedding prediction.

This face needs torch and NumPy alone; everything else is imported where it is used.
"""

from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.gmm import GaussianMixture, gmm_posterior

__version__ = "0.1.0"

__all__ = [
    "GaussianMixture",
    "InputError",
    "LogMelSpec",
    "__version__",
    "gmm_posterior",
    "log_mel",
]
