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
    """Of the host for the device; a copy to pageable memory and what torch waits for after it are
    two."""
    impossible: int
    """Launches that a device would refuse: an empty grid, a block too large."""

    def since(self, before: Counts) -> Counts:
        """What has been counted after `before`."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def counts() -> Counts:
    """All counts.

    Raises:
        SystemExit: a process without null CUDA.
    """
    numbers = ctypes.c_int64 * len(Counts._fields)
    try:
        return Counts(*numbers.in_dll(ctypes.CDLL(None), "null_cuda_counts"))
    except ValueError:
        raise SystemExit("counts are null CUDA's: python -m bench.null_cuda COMMAND") from None
