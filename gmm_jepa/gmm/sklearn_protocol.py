"""What scikit-learn's tools (clone, pipelines, grid search) ask of an estimator, without it."""

from __future__ import annotations

import inspect
from typing import Any

from gmm_jepa.errors import InputError


class NotFittedError(ValueError, AttributeError):
    """A mixture was used before `fit` or `load`; bases as scikit-learn's error of this name."""


class SklearnProtocol:
    """Parameters by name, tags and the fitted state of an estimator with ``means_``."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **params: Any) -> SklearnProtocol:
        """Set constructor arguments by name; returns itself.

        Raises:
            InputError: there is no such argument.
        """
        known = list(self._defaults())
        for name in params:
            if name not in known:
                raise InputError(
                    f"Invalid parameter {name!r} for estimator {self!r}. "
                    f"Valid parameters are: {known!r}."
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def check_fitted(self) -> None:
        """Raise `NotFittedError` before `fit` or `load`."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. "
                "Call 'fit' with appropriate arguments before using this estimator."
            )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")  # set with the parameters

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags  # its caller is scikit-learn

        return Tags(
            estimator_type="density_estimator",
            target_tags=TargetTags(required=False),
            input_tags=InputTags(),
        )

    def __repr__(self) -> str:
        changed = (
            f"{name}={getattr(self, name)!r}"
            for name, default in self._defaults().items()
            if not name.endswith("_init") and getattr(self, name) != default
        )
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        parameters = list(inspect.signature(cls).parameters.values())
        return {parameter.name: parameter.default for parameter in parameters}
