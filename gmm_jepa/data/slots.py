"""Memory that batches are made in, over and over, shared by the workers and the main process.

Fresh memory is the dearest part of a batch: the kernel clears each page and maps it in both
processes, and every tensor that crosses takes a file descriptor and a connection. Here a worker
fills one of its slots, sends where its tensors lie, and gets the slot back when nothing in the main
process refers to it any more.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
import pickle
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64
_numbers = itertools.count()
_all: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Room:
    """Where the tensors of one result are made: in a slot, or wherever PyTorch likes.

    Args:
        memory: (n_bytes,) uint8; None where no slot is free.
        slot: its number.
    """

    def __init__(self, memory: Tensor | None, slot: int | None):
        self.memory, self.slot = memory, slot
        self._used_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that is not filled; outside the slot where that is full."""
        place = self._carve(shape, dtype)
        return torch.empty(shape, dtype=dtype) if place is None else _at(self.memory, place)

    def place(self, tensor: Tensor) -> _Place | None:
        """Where a tensor lies in the slot, copied into it if need be; None if there is no room."""
        if self.memory is None:
            return None
        offset = tensor.data_ptr() - self.memory.data_ptr()
        if 0 <= offset < len(self.memory) and tensor.is_contiguous():
            return offset, tensor.dtype, tuple(tensor.shape)
        place = self._carve(tuple(tensor.shape), tensor.dtype)
        if place is not None:
            _at(self.memory, place).copy_(tensor)
        return place

    def _carve(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Place | None:
        begin, n_bytes = self._used_bytes, math.prod(shape) * dtype.itemsize
        if self.memory is None or begin + n_bytes > len(self.memory):
            return None
        self._used_bytes = begin + _rounded(n_bytes, _ALIGNMENT_BYTES)
        return begin, dtype, shape


class Slots:
    """Slots of one loader. Where a system has no anonymous files, there are none.

    Pages take memory once they are written: slots may be larger than what is put in them.

    Args:
        n_owners: workers, each with slots of its own.
        n_slots: of each owner.
        n_bytes: of each slot.
    """

    def __init__(self, n_owners: int, n_slots: int, n_bytes: int):
        self._number = next(_numbers)
        self._n_slots, self._n_bytes = n_slots, _rounded(n_bytes, mmap.PAGESIZE)
        self._head_bytes = _rounded(n_owners * n_slots, mmap.PAGESIZE)
        try:
            file = os.memfd_create("gmm_jepa_batches")
            os.ftruncate(file, self._head_bytes + n_owners * n_slots * self._n_bytes)
            self._map(file)
        except (AttributeError, OSError):  # a system without it, or one that refuses
            self._n_slots = 0
            return
        _all[self._number] = self

    def take(self, owner: int) -> Room:
        """A free slot of a worker's, for that worker alone to call."""
        slot = self._free(owner)
        return Room(None if slot is None else torch.from_numpy(self._memory(slot)), slot)

    def borrow(self) -> Room:
        """A free slot for a loader without workers: free again when its tensors are gone."""
        slot = self._free(0)
        return Room(None if slot is None else self.lend(slot), slot)

    def lend(self, slot: int) -> Tensor:
        """The memory of a slot, which is free again when nothing refers to it any more."""
        memory = self._memory(slot)
        # Not before the last of its views: all have it for their base, or their storage's.
        end = weakref.finalize(memory, self._release, slot, os.getpid())
        end.atexit = False
        return torch.from_numpy(memory)

    def send(self, result: Any, room: Room) -> Sent:
        """What brings a result to the main process."""
        stream = io.BytesIO()
        _Pickler(stream, room).dump(result)
        return Sent(self._number, room.slot, stream.getvalue())

    def _free(self, owner: int) -> int | None:
        for slot in range(owner * self._n_slots, (owner + 1) * self._n_slots):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return None

    def _release(self, slot: int, borrower: int) -> None:
        if os.getpid() == borrower:  # a fork of the borrower has its objects, but not its rights
            self._taken[slot] = 0

    def _memory(self, slot: int) -> np.ndarray:
        begin = self._head_bytes + slot * self._n_bytes
        return np.frombuffer(self._mapped, np.uint8, self._n_bytes, begin)

    def _map(self, file: int) -> None:
        self._file, self._mapped = file, mmap.mmap(file, 0)
        # One byte a slot: its worker alone sets it, and whoever borrowed the slot alone clears it.
        self._taken = np.frombuffer(self._mapped, np.uint8, self._head_bytes)
        weakref.finalize(self, os.close, file)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned."""
        state = {**self.__dict__}
        if self._n_slots:
            del state["_mapped"], state["_taken"]
            state["_file"] = DupFd(self._file)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._n_slots:
            self._map(self._file.detach())


@dataclass(frozen=True)
class Sent:
    """A result on its way to the main process: its tensors lie in a slot, the rest is pickled."""

    slots: int
    slot: int | None
    pickled: bytes

    def open(self) -> Any:
        """The result, once. Its tensors hold the slot."""
        memory = None if self.slot is None else _all[self.slots].lend(self.slot)
        return _Unpickler(io.BytesIO(self.pickled), memory).load()

    def pin_memory(self) -> Any:
        """The result in page-locked memory; it no longer holds the slot."""
        return self.open().pin_memory()


_Place = tuple[int, torch.dtype, tuple[int, ...]]  # first byte, type and shape


class _Pickler(ForkingPickler):
    def __init__(self, stream: io.BytesIO, room: Room):
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._room = room

    def persistent_id(self, value: object) -> _Place | None:
        if isinstance(value, Tensor) and _is_plain(value):
            return self._room.place(value)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, memory: Tensor | None):
        super().__init__(stream)
        self._memory = memory

    def persistent_load(self, place: _Place) -> Tensor:
        return _at(self._memory, place)


def _is_plain(tensor: Tensor) -> bool:
    """Whether values, type and shape are all there is to it."""
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return on_cpu and type(tensor) is Tensor and not tensor.requires_grad


def _at(memory: Tensor, place: _Place) -> Tensor:
    begin, dtype, shape = place
    end = begin + math.prod(shape) * dtype.itemsize
    return memory[begin:end].view(dtype).view(shape)


def _rounded(n_bytes: int, step: int) -> int:
    return -(-n_bytes // step) * step
