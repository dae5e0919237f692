"""GMM-JEPA: pretrain speech encoders with GMM-anchored joint-embedding prediction.

This face needs torch and NumPy alone; everything else is imported where it is used. Its names, and
modules, are imported when they are asked for, so that the command line can set what torch reads at
its start. ``import gmm_jepa.ops`` registers the operators.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmm_jepa.encoder import load_encoder
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

_HOMES = {
    "GaussianMixture": "gmm",
    "InputError": "errors",
    "LogMelSpec": "features",
    "gmm_posterior": "gmm",
    "load_encoder": "encoder",
    "log_mel": "features",
}


def __getattr__(name: str) -> Any:
    """One of `__all__`, from the module that it is in, or a module."""
    if name in _HOMES:
        globals()[name] = getattr(importlib.import_module(f"gmm_jepa.{_HOMES[name]}"), name)
        return globals()[name]
    try:
        return importlib.import_module(f"gmm_jepa.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"gmm_jepa.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
