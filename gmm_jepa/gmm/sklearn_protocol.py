"""What scikit-learn's tools (clone, pipelines, grid search) ask of an estimator, without it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.gmm.stream import Frames, as_frames


class NotFittedError(ValueError, AttributeError):
    """A mixture was used before `fit` or `load`; bases as scikit-learn's error of this name."""


class SklearnProtocol:
    """Parameters by name, tags, checks and the fitted state of an estimator."""

    _estimator_type = "density_estimator"

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

    def fit_predict(self, X: Frames, y: None = None) -> Frames:
        """`fit`, then `predict` of the same (N, D) frames."""
        return self.fit(X).predict(X)

    def check_fitted(self) -> None:
        """Raise `NotFittedError` before `fit` or `load`."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                f"This {type(self).__name__} instance is not fitted yet. "
                "Call 'fit' with appropriate arguments before using this estimator."
            )

    def _check_sizes(self, K: str) -> None:
        """Refuse sizes that make no sense; `K` is the name of how many clusters are fitted."""
        for name in (K, "max_iter", "n_init_frames"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected a whole number above 0, got {value!r}")
        n_clusters = getattr(self, K)
        if self.n_init_frames < n_clusters:
            raise InputError(
                f"n_init_frames: expected at least {K} = {n_clusters}, got {self.n_init_frames}"
            )

    def _checked(self, X: Frames) -> Tensor:
        """X as frames (N, D) of the features of the fit."""
        self.check_fitted()
        frames = as_frames(X)
        if frames.shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {frames.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return frames

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")  # set with the parameters

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags  # its caller is scikit-learn

        return Tags(
            estimator_type=self._estimator_type,
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
