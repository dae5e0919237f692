"""How the process of a command behaves: threads that wait, memory that was freed."""

from __future__ import annotations

import ctypes
import os

SPINS = "5000"
"""How often an idle thread of GNU's OpenMP looks for work before it sleeps: a quarter of a
millisecond. By its own choice it looks for 10 ms and more, and so takes the time of whatever else
needs the core: beside one busy loop the small conformer trained on two cores at a twentieth of its
speed, with this at a third to a half, and alone at the same speed within noise."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**31 - 1
_MAPPED_BYTES = 2**25
"""The most that glibc takes; by itself it comes to this, too, but not once the other is set."""
_CHOSEN = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


def let_threads_sleep() -> None:
    """Before torch is imported, which reads it; who chose otherwise has it so."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_freed_memory() -> None:
    """Let glibc keep what was freed, where it is the allocator; who chose otherwise has it so.

    A training step frees its activations, and the next one would get them anew from the system,
    page by page. A step of the default conformer, 4 x 4 s on two cores, met 4,700 new pages in the
    place of 27,000, was in the system for 0.07 s in the place of 0.15, and took 0.85 of the time
    (median of six pairs of processes, 0.65 to 1.27 on a noisy machine); the memory at its peak was
    the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or _CHOSEN & os.environ.keys():
        return
    mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
