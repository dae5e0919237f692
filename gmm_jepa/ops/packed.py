"""Mixtures packed for kernels: to fold one takes about as long as a kernel on a batch of frames."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.ops.mixture import Mixture
from gmm_jepa.ops.native import _native

Operand = TypeVar("Operand")
_WIDE = (torch.float32, torch.float64)


class PackedMixtures(Generic[Operand]):
    """The last few operands that a function made of mixtures on a CUDA device.

    A kept entry holds the mixture's tensors, so their addresses cannot be reused, and their version
    counters tell when they were written to. Each stream has its own: no stream waits for another.
    To compare values would make the host wait. So what counts no version is not seen: writes to
    ``tensor.data``, by collectives of torch.distributed, by another library. After one of these
    call `forget_mixtures`.

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

    To read the values takes 0.1 ms at K = 1,024, D = 80, where to prepare a mixture for the native
    module takes 1.3. Version counters would not do: NumPy, ``tensor.data`` and collectives of
    torch.distributed write past them.

    Args:
        pack: makes an operand of a mixture and further arguments.
        n_kept: operands kept.
        n_values: means that all of these may have together; the last one is kept whatever it has.
    """

    def __init__(self, pack: Callable[..., Operand], n_kept: int, n_values: int = 1 << 20) -> None:
        self._pack, self._n_kept, self._n_values = pack, n_kept, n_values
        self._kept: tuple[_Kept[Operand], ...] = ()

    def __call__(self, mixture: Mixture, *arguments: object) -> Operand:
        """The operand of the mixture, made if it is not among those kept."""
        key = (*arguments, *map(_fingerprint, mixture))
        entry = next((e for e in self._kept if e.key == key), None)
        if entry is None:
            self._kept = self._kept[: self._n_kept - 1]  # first: the new one may have its memory
            with torch.inference_mode(False):
                copy = Mixture(*(torch.from_numpy(array_of(p).copy()) for p in mixture))
                entry = _Kept(key, mixture.means.numel(), self._pack(copy, *arguments))
        # Replaced as a whole: a thread that does the same at once costs a packing, no more.
        others = (e for e in self._kept if e is not entry)
        self._kept = tuple(self._room_for([entry, *others]))
        return entry.operand

    def _room_for(self, entries: list[_Kept[Operand]]) -> Iterator[_Kept[Operand]]:
        """As many of the first as may be kept."""
        n_values = 0
        for i, entry in enumerate(entries[: self._n_kept]):
            n_values += entry.n_values
            if i and n_values > self._n_values:
                return
            yield entry


@dataclass(frozen=True)
class _Kept(Generic[Operand]):
    key: tuple
    n_values: int
    operand: Operand


def _fingerprint(parameter: Tensor) -> tuple[torch.dtype, torch.Size, object]:
    """What tells a parameter from others, by its values."""
    plain = parameter
    if not parameter.is_contiguous() or parameter.dtype not in _WIDE or parameter.is_neg():
        plain = torch.from_numpy(np.ascontiguousarray(array_of(parameter)))
    if _native is None:
        values: object = hashlib.blake2b(array_of(plain).data).digest()
    else:
        values = _native.fingerprint(plain.data_ptr(), plain.nbytes)
    return plain.dtype, plain.shape, values


def array_of(parameter: Tensor) -> np.ndarray:
    """A parameter in a CPU's memory for NumPy, to read.

    NumPy works in a forked process, too. Torch's threads do not live on there, and whatever torch
    shares among them waits for ever.
    """
    is_wide = parameter.dtype in _WIDE
    return np.from_dlpack((parameter if is_wide else parameter.double()).detach().resolve_neg())


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
    return (_n_forgotten, stream, *tensors)


_n_forgotten = 0


def forget_mixtures() -> None:
    """Let the next calls on CUDA devices read their mixtures anew; see `PackedMixtures`."""
    global _n_forgotten
    _n_forgotten += 1
