"""Mixtures packed for kernels on a GPU: folding one takes about as long as a kernel on a batch."""

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
