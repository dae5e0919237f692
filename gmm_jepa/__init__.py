"""GMM-JEPA: pretrain speech encoders with GMM-anchored joint-embedding prediction.

This face needs torch and NumPy alone; everything else is imported where it is used.
"""

from typing import Any

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
    "load_encoder",
    "log_mel",
]


def __getattr__(name: str) -> Any:
    """`load_encoder`, imported when it is asked for: it needs more than the rest."""
    if name == "load_encoder":
        from gmm_jepa.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
