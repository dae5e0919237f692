"""Mixtures packed for kernels: to fold one takes about as long as a kernel on a batch of frames."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from gmm_jepa.ops.mixture import Mixture

Operand = TypeVar("Operand")


class PackedMixtures(Generic[Operand]):
    """The last few operands that a function made of mixtures.

    A kept entry holds the mixture's tensors, so their addresses cannot be reused, and their version
    counters tell when they were written to. Each stream has its own: no stream waits for another.

    Args:
        pack: makes an operand of a mixture and further arguments, which can be hashed.
        n_kept: operands kept.
    """

    def __init__(self, pack: Callable[..., Operand], n_kept: int) -> None:
        self._pack, self._n_kept = pack, n_kept
        self._kept: OrderedDict[tuple, tuple[Operand, Mixture]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, mixture: Mixture, *arguments: object) -> Operand:
        """The operand of the mixture, made if it is not among those kept."""
        key = _key(mixture)
        if key is None:
            return self._pack(mixture, *arguments)
        key += arguments
        with self._lock:
            entry = self._kept.get(key)
        if entry is None:
            entry = (self._pack(mixture, *arguments), mixture)
        with self._lock:
            self._kept[key] = entry
            self._kept.move_to_end(key)
            if len(self._kept) > self._n_kept:
                self._kept.popitem(last=False)
        return entry[0]


class MixturesByValue(Generic[Operand]):
    """The last few operands that a function made of mixtures on a CPU, found again by their values.

    NumPy may share a parameter's memory and write to it without a version counter; to compare takes
    a twentieth of the time of packing.

    Args:
        pack: makes an operand of a mixture and further arguments.
        n_kept: operands kept, each beside a copy of its mixture.
    """

    def __init__(self, pack: Callable[..., Operand], n_kept: int) -> None:
        self._pack, self._n_kept = pack, n_kept
        self._kept: tuple[tuple[Mixture, tuple, Operand], ...] = ()

    def __call__(self, mixture: Mixture, *arguments: object) -> Operand:
        """The operand of the mixture, made if it is not among those kept."""
        kept = self._kept
        for entry in kept:
            if entry[1] == arguments and _same_values(entry[0], mixture):
                break
        else:
            copy = Mixture(*(parameter.detach().clone() for parameter in mixture))
            entry = (copy, arguments, self._pack(copy, *arguments))
        # Replaced as a whole: a thread that does the same at once costs a packing, no more.
        self._kept = (entry, *(e for e in kept if e is not entry))[: self._n_kept]
        return entry[2]


def _same_values(a: Mixture, b: Mixture) -> bool:
    return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _key(mixture: Mixture) -> tuple | None:
    """What a kept operand is known by; None if it must not be kept."""
    if any(parameter.is_inference() for parameter in mixture):
        return None  # no version counter: cannot tell whether it is still true
    stream = None
    if mixture.means.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None  # what a graph makes has its values only when the graph runs
        stream = torch.cuda.current_stream(mixture.means.device).cuda_stream
    tensors = ((p.data_ptr(), p._version, p.dtype, p.device, p.shape, p.stride()) for p in mixture)
    return (stream, *tensors)
