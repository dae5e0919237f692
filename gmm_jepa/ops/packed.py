"""Mixtures packed for kernels: to fold one takes about as long as a kernel on a batch of frames."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

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

    Where torch alone knows of the memory, version counters tell that it was not written to, and
    nothing is compared: at K = 1,024, D = 80 that takes 0.07 ms and the caches of a core, where to
    prepare a mixture for the native module takes 1.1. NumPy writes to shared memory where no
    counter sees it.

    Args:
        pack: makes an operand of a mixture and further arguments.
        n_kept: operands kept, each beside a copy of its mixture.
        n_values: means that all of these may have together; the last one is kept whatever it has.
    """

    def __init__(self, pack: Callable[..., Operand], n_kept: int, n_values: int = 1 << 20) -> None:
        self._pack, self._n_kept, self._n_values = pack, n_kept, n_values
        self._kept: tuple[_Kept[Operand], ...] = ()

    def __call__(self, mixture: Mixture, *arguments: object) -> Operand:
        """The operand of the mixture, made if it is not among those kept."""
        is_torchs = all(p.untyped_storage().resizable() for p in mixture)
        key = _key(mixture) if is_torchs else None
        source = None if key is None else mixture
        entry = self._find(mixture, key, arguments)
        if entry is None:
            self._kept = self._kept[: self._n_kept - 1]  # first: the new one may have its memory
            with torch.inference_mode(False):
                copy = Mixture(*(torch.from_numpy(array_of(p).copy()) for p in mixture))
                entry = _Kept(copy, arguments, self._pack(copy, *arguments), key, source)
        elif entry.key != key:
            entry = replace(entry, key=key, source=source)
        # Replaced as a whole: a thread that does the same at once costs a packing, no more.
        others = (e for e in self._kept if e.mixture is not entry.mixture)
        self._kept = tuple(self._room_for([entry, *others]))
        return entry.operand

    def _find(self, mixture: Mixture, key: tuple | None, arguments: tuple) -> _Kept[Operand] | None:
        kept = [entry for entry in self._kept if entry.arguments == arguments]
        for entry in kept:
            if key is not None and entry.key == key:
                return entry
        return next((entry for entry in kept if _same_values(entry.mixture, mixture)), None)

    def _room_for(self, entries: list[_Kept[Operand]]) -> Iterator[_Kept[Operand]]:
        """As many of the first as may be kept."""
        n_values = 0
        for i, entry in enumerate(entries[: self._n_kept]):
            n_values += entry.mixture.means.numel()
            if i and n_values > self._n_values:
                return
            yield entry


@dataclass(frozen=True)
class _Kept(Generic[Operand]):
    mixture: Mixture
    arguments: tuple
    operand: Operand
    key: tuple | None
    source: Mixture | None
    """what the key is of, kept so that its addresses are not used again"""


def array_of(parameter: Tensor) -> np.ndarray:
    """A parameter in a CPU's memory for NumPy, to read: `Tensor.numpy` would mark it as shared.

    NumPy works in a forked process, too. Torch's threads do not live on there, and whatever torch
    shares among them waits for ever.
    """
    is_wide = parameter.dtype in (torch.float32, torch.float64)
    return np.from_dlpack((parameter if is_wide else parameter.double()).detach().resolve_neg())


def _same_values(a: Mixture, b: Mixture) -> bool:
    return all(p.dtype == q.dtype and _equal(p, q) for p, q in zip(a, b, strict=True))


def _equal(p: Tensor, q: Tensor) -> bool:
    """By torch's threads, a third of NumPy's time, where they are."""
    return np.array_equal(array_of(p), array_of(q)) if _is_forked else torch.equal(p, q)


_is_forked = False


def _remember_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_fork)


def mixture_on(mixture: Mixture, device: torch.device) -> Mixture:
    """A mixture in a CPU's memory on any device: the same tensors from call to call.

    So what operators pack of them is packed once. Each stream has its own.
    """
    if device.type == "cpu":
        return mixture
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return _on_device(mixture, device, stream)


_on_device = MixturesByValue(
    lambda mixture, device, stream: Mixture(*(p.to(device) for p in mixture)), n_kept=8
)


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
