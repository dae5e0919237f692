"""Checks of arguments that several ops have in common; what is wrong is named in one line."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from gmm_jepa.errors import InputError


def check_sequence(x: Tensor, *, fewest_frames: int = 0) -> None:
    """Raise InputError unless x is (B, T, C) of floats, T no smaller than that."""
    if x.ndim != 3 or not x.is_floating_point() or x.shape[1] < fewest_frames:
        wanted = "(B, T, C)" + (f", T at least {fewest_frames}" if fewest_frames else "")
        raise InputError(f"x: expected floats {wanted}, got {x.dtype} {tuple(x.shape)}")


def check_shapes(
    x: Tensor,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """Raise InputError unless every tensor is there, has its shape and is where x is."""
    for name, tensor, shape in zip(names, tensors, shapes):
        if tensor is None:
            raise InputError(f"{name}: expected {tuple(shape)}, got None")
        if tensor.shape != shape:
            raise InputError(f"{name}: expected {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise InputError(f"{name}: on {tensor.device}, but x on {x.device}")


def check_probability(name: str, p: float) -> None:
    """Raise InputError unless values can be dropped with it."""
    if not 0.0 <= p < 1.0:
        raise InputError(f"{name}: expected at least 0 and below 1, got {p}")


def check_temperature(temperature: float) -> None:
    """Raise InputError unless it is above zero."""
    if not isinstance(temperature, Real) or not temperature > 0.0:
        raise InputError(f"temperature: expected a number above 0, got {temperature!r}")


def kind_of(value: object) -> str:
    """What to call a wrong argument in an error message."""
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
