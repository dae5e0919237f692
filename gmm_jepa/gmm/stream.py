"""Frames as a stream of checked batches: arrays, tensors, or anything that iterates twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError

Frames = np.ndarray | Tensor
Batches = Iterable[Frames] | Callable[[], Iterable[Frames]]

# Rows of an array handed on at a time: 21 MB of float32 at D = 80, small beside the ops' chunks.
BATCH_ROWS = 65_536


class FrameStream:
    """Frames (n, D) batch by batch, as often as asked, as floating-point tensors.

    Every pass checks that values are finite, that the number of features stays the same, and
    that the stream is as long as it was in the first pass.

    Args:
        X: (N, D) array, tensor or nested list; or a re-iterable of (n, D) batches (a list of
            arrays, a DataLoader, an object whose ``__iter__`` starts afresh); or a function
            without arguments that returns such an iterator.

    Raises:
        InputError: a one-shot iterator, a wrong shape, no frames, NaN or infinity (with the row).
        TypeError: sparse data, or no data at all.
    """

    def __init__(self, X: Frames | Batches) -> None:
        self._batches = _batches(X)
        self.n_rows: int | None = None
        """frames of one pass; known after the first"""
        self.n_features: int | None = None
        """D; known after the first batch"""

    def __iter__(self) -> Iterator[Tensor]:
        n_rows = 0
        for batch in self._batches():
            frames = as_frames(batch, first_row=n_rows)
            if self.n_features is None:
                self.n_features = frames.shape[1]
            elif frames.shape[1] != self.n_features:
                raise InputError(
                    f"X: row {n_rows} has {frames.shape[1]} features, expected {self.n_features}"
                )
            n_rows += frames.shape[0]
            yield frames
        if self.n_rows is None:
            self.n_rows = n_rows
        elif n_rows != self.n_rows:
            raise InputError(
                f"X: a later pass gave {n_rows} rows, the first {self.n_rows}; "
                "expected the same frames in every pass"
            )


def as_frames(batch: Any, *, first_row: int = 0) -> Tensor:
    """One batch as a finite floating-point tensor (n, D), sharing memory where possible.

    Args:
        batch: array, tensor or nested list of numbers.
        first_row: number of its first row in the whole stream, for messages.

    Raises:
        InputError: not two-dimensional, no features, complex, NaN or infinity.
        TypeError: sparse or not numeric.
    """
    frames = batch if isinstance(batch, Tensor) else _from_array(batch)
    if frames.is_complex():
        raise InputError("X: Complex data not supported")
    if not frames.is_floating_point():
        frames = frames.double()
    if frames.ndim != 2:
        raise InputError(
            f"X: Expected 2D array, got {frames.ndim}D array instead, shape {tuple(frames.shape)}. "
            "Reshape your data: one frame a row"
        )
    if frames.shape[1] == 0:
        raise InputError(
            f"X: 0 feature(s) (shape={tuple(frames.shape)}) while a minimum of 1 is required."
        )
    frames = frames.detach()
    # a finite sum proves that every value is finite, for one cheap pass
    if not bool(torch.isfinite(frames.sum(dtype=torch.float64))):
        bad = (~torch.isfinite(frames)).nonzero()
        if bad.numel():
            row, column = bad[0].tolist()
            value = frames[row, column].item()
            raise InputError(
                f"X: expected finite values, got {'NaN' if value != value else value} "
                f"(NaN or infinity) in row {first_row + row}, column {column}"
            )
    return frames


def _batches(X: Frames | Batches) -> Callable[[], Iterable[Any]]:
    if isinstance(X, Tensor) or hasattr(X, "__array__") or _is_nested_list(X):
        whole = X if isinstance(X, (Tensor, np.ndarray)) else _numeric(X)
        if whole.ndim != 2:
            as_frames(whole)  # says what is wrong
        return lambda: (whole[i : i + BATCH_ROWS] for i in range(0, len(whole), BATCH_ROWS))
    if _is_sparse(X):
        raise TypeError("X: sparse data is not supported, expected a dense array")
    if isinstance(X, Iterator):
        raise InputError(
            f"X: expected something that can be iterated more than once, got {type(X).__name__}, "
            "which is used up after one pass; give a list of batches, an object whose __iter__ "
            "starts afresh, or the function that makes the generator"
        )
    if callable(X):
        return _fresh(X)
    if isinstance(X, Iterable) and not isinstance(X, (str, bytes)):
        return lambda: X
    raise TypeError(f"X: expected an array, a tensor or batches, got {type(X).__name__}")


def _fresh(make: Callable[[], Iterable[Frames]]) -> Callable[[], Iterable[Frames]]:
    previous: list[object] = []

    def batches() -> Iterable[Frames]:
        stream = make()
        if previous and stream is previous[0] and isinstance(stream, Iterator):
            raise InputError("X: the function gave the same iterator twice, expected a fresh one")
        previous[:] = [stream]
        return stream

    return batches


def _is_nested_list(X: object) -> bool:
    """A list of rows of numbers, rather than a list of batches."""
    return isinstance(X, (list, tuple)) and not (
        X and isinstance(X[0], (np.ndarray, Tensor)) and X[0].ndim == 2
    )


def _is_sparse(X: object) -> bool:
    return hasattr(X, "toarray") and hasattr(X, "nnz")


def _numeric(X: Any) -> np.ndarray:
    if _is_sparse(X):
        raise TypeError("X: sparse data is not supported, expected a dense array")
    try:
        array = np.asarray(X)
        if array.dtype.kind not in "fiubc":
            array = array.astype(np.float64)
    except TypeError as error:
        raise TypeError(f"X: expected numbers, {error}") from error
    except ValueError as error:
        raise InputError(f"X: expected numbers, {error}") from error
    return array


def _from_array(X: Any) -> Tensor:
    array = _numeric(X)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    odd = any(s < 0 or s % array.itemsize for s in array.strides)  # flipped, a field of records
    if odd or not array.flags.writeable or not array.dtype.isnative:  # or memory-mapped
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array)
