"""What null CUDA has counted in this process."""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Counts(NamedTuple):
    """Since the process began."""

    launches: int
    """Of kernels and matrix products; those of a graph once, as it is captured."""
    graphs: int
    """CUDA graphs launched."""
    waits: int
    """Of the host for the device."""
    impossible: int
    """Launches that a device would refuse: an empty grid, a block too large."""

    def since(self, before: Counts) -> Counts:
        """What has been counted after `before`."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def counts() -> Counts:
    """All counts; AttributeError in a process without null CUDA."""
    numbers = ctypes.c_int64 * len(Counts._fields)
    return Counts(*numbers.in_dll(ctypes.CDLL(None), "null_cuda_counts"))
