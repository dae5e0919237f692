"""The door to the native module, ``gmm_jepa._native`` (sources in ``csrc/``).

The module takes addresses, sizes and strides; ``native_mixture.py`` and its neighbours register
what it computes as kernels of the operators. Where it was not built nothing is registered, and the
operators run on torch alone. ``GMM_JEPA_CUDA_EM=0`` leaves its CUDA part out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmm_jepa.errors import InputError

_PACKAGE = Path(__file__).parents[1]
BARE_CHECKOUT = "this is a checkout without its native module: pip install -e ., or run elsewhere"
"""Why the module is absent where nobody built it."""


def is_bare_checkout() -> bool:
    """Whether the package lies beside its setup.py, and no native module in it."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    is_built = any(os.path.isfile(_PACKAGE / f"_native{suffix}") for suffix in suffixes)
    return os.path.isfile(_PACKAGE.parent / "setup.py") and not is_built


try:
    from gmm_jepa import _native
except ImportError as error:
    _native = None
    _why_absent = BARE_CHECKOUT if is_bare_checkout() else str(error)

_CUDA_SWITCH = "GMM_JEPA_CUDA_EM"
_SHARED_BYTES = 222_208  # of a block of em_screen_kernel at most (make ptxas)
_SOURCES = (".h", ".cpp", ".cuh", ".cu")
_PF_FORKNOEXEC = 0x40  # of Linux, include/linux/sched.h

# Every call names the set it runs with, or a mixture prepared for one; the empty name is the best.
_instruction_set = ""
_instruction_sets = _native.instruction_sets().split(",") if _native is not None else []


def instruction_sets() -> list[str]:
    """Names of the sets that this build and this processor can run, best first; empty without."""
    return list(_instruction_sets)


def multiplies_bfloat16() -> bool:
    """Whether the chosen set has products of pairs of bfloat16."""
    chosen = _instruction_set or (_instruction_sets[0] if _instruction_sets else "")
    return chosen in ("amx", "avx512bf16")


def use_instruction_set(name: str) -> None:
    """Run with one of `instruction_sets`, or with the best for ``""``; for tests and benchmarks."""
    global _instruction_set
    if name and name not in instruction_sets():
        raise ValueError(f"name: expected one of {instruction_sets()}, got {name!r}")
    _instruction_set = name


def chosen_set() -> str:
    """What `use_instruction_set` was given last; empty for the best."""
    return _instruction_set


def status() -> str:
    """One line for people: live with which instruction set, or why not."""
    if _native is None:
        return f"off: {_why_absent}"
    best, *others = instruction_sets()
    return f"live ({_instruction_set or best}; can also run {', '.join(others) or 'none'})"


def cuda_architectures() -> str:
    """Targets that the module's CUDA part was built for, comma separated; empty without one."""
    return getattr(_native, "cuda_architectures", "")


def uses_cuda() -> bool:
    """Whether EM on CUDA tensors is the module's, as it was asked for when this was imported."""
    return bool(cuda_architectures()) and os.environ.get(_CUDA_SWITCH) != "0"


@functools.cache
def runs_em_on(device_index: int) -> bool:
    """Whether EM's kernels were built for a CUDA device, and find the shared memory they take."""
    if device_index >= _native.cuda_device_count():  # a driver for torch, but not for newer nvcc
        return False
    found = torch.cuda.get_device_properties(device_index)
    is_built = _runs_on((found.major, found.minor), cuda_architectures())
    return is_built and found.shared_memory_per_block_optin >= _SHARED_BYTES


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU can run code of architectures such as ``sm_80,sm_90a``.

    Code runs within its generation, with a letter on that GPU alone; that of the last architecture
    is there as PTX, too, which later GPUs compile.
    """
    *_, last = names = [name.removeprefix("sm_") for name in architectures.split(",")]
    for name in names:
        own = not name[-1].isdigit()
        number = int(name.rstrip("af"))
        major, minor = divmod(number, 10)
        if own and (major, minor) == capability:
            return True
        if not own and (capability[0] == major or name is last) and capability >= (major, minor):
            return True
    return False


def cuda_status() -> str:
    """One line for people: whether the CUDA part of the module is built and used."""
    if _native is None:
        return f"off: {_why_absent}"
    if not cuda_architectures():
        return "off: built without nvcc"
    built = f"built for {cuda_architectures()}"
    if not uses_cuda():
        return f"off: {built}; {_CUDA_SWITCH}=0 is set"
    if not _native.cuda_device_count():
        return f"off: {built}; no CUDA device that its runtime can drive"
    if not all(map(runs_em_on, range(torch.cuda.device_count()))):
        return f"off on a device here, which it was not made for: {built}"
    return f"on, {built}"


def is_intel() -> bool:
    """Whether the processor is Intel's, as far as the module can tell."""
    return _native is not None and _native.is_intel()


def call(name: str, *arguments: object) -> Any:
    """A function of the module, with the chosen instruction set on torch's number of threads."""
    return getattr(_native, name)(*arguments, _instruction_set, torch.get_num_threads())


def check(
    name: str,
    tensors: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuse what the module would read beyond its end.

    Functions of operators have better words; this is for operators called past their functions.

    Args:
        name: of what is called, for the message.
        tensors: None fits any shape.
        shapes: one for each tensor.
        dtype: of all.

    Raises:
        InputError: a tensor is of another shape or type.
    """
    for tensor, shape in zip(tensors, shapes):
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(f"{name}: expected {dtype} {tuple(shape)}, got {found}")


def lengths_of(lengths: Tensor | None, rows: Tensor) -> Tensor | None:
    """Lengths of `rows` (B, ...) as the module takes them: int64, dense.

    Raises:
        InputError: there is not one a row.
    """
    if lengths is None:
        return None
    lengths = lengths.long().contiguous()
    check("lengths", (lengths,), ((rows.shape[0],),), torch.int64)
    return lengths


def drawn_by(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    """What draws a dropout, as the module takes it: seed and probability, none without a seed."""
    return (0, 0.0) if seed is None else (int(seed) & (2**64 - 1), dropout_p)


def address_of(tensor: Tensor | None) -> int:
    """Where its values are; 0 of None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix_of(x: Tensor) -> tuple[int, int, int, int, int]:
    """A matrix as the module takes it: address, shape, strides."""
    return (x.data_ptr(), *x.shape, *x.stride())


def _warn_if_stale() -> None:
    """Where its sources lie beside the package, they may be newer than the module."""
    sources = Path(__file__).parents[2] / "csrc"
    if multiprocessing.parent_process() is not None or not sources.is_dir():
        return
    built_s = Path(_native.__file__).stat().st_mtime
    files = (path for path in sources.rglob("*") if path.suffix in _SOURCES)
    if any(path.stat().st_mtime > built_s for path in files):
        warnings.warn(
            "gmm_jepa: the native module is older than csrc/, build it again: make native",
            RuntimeWarning,
            stacklevel=2,
        )


def _was_forked() -> bool:
    """Whether this process was forked and no program was started in it, as far as Linux tells."""
    try:
        status = Path("/proc/self/stat").read_text()
    except OSError:
        return False
    flags = int(status.rpartition(")")[2].split()[6])
    return bool(flags & _PF_FORKNOEXEC)


def _installed_elsewhere() -> str | None:
    """Folder of another copy of the package that an import from elsewhere would find, or None."""
    for entry in sys.path:
        folder = os.path.join(entry, _PACKAGE.name) if isinstance(entry, str) else ""
        if not os.path.isfile(os.path.join(folder, "__init__.py")):
            continue
        try:
            if not os.path.samefile(folder, _PACKAGE):
                return folder
        except OSError:  # it was there a moment ago
            continue
    return None


def _warn_if_shadowed() -> None:
    """A checkout in the current folder comes before an installed package, which may be faster."""
    if multiprocessing.parent_process() is not None or not is_bare_checkout():
        return
    installed = _installed_elsewhere()
    if installed is not None:
        warnings.warn(
            f"gmm_jepa: {BARE_CHECKOUT}; it hides the installed package, {installed}",
            RuntimeWarning,
            stacklevel=2,
        )


def _share_threads() -> None:
    """Let the module run on the threads of torch's own OpenMP runtime, where it is GNU's.

    Not in a process that was forked before this: the runtime counts on threads that are not there.
    """
    if _was_forked() or not hasattr(os, "RTLD_NOLOAD"):
        return
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("libgomp*")):
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        try:
            # the one that torch runs on, or none
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            functions = [getattr(library, name) for name in names]
        except (OSError, AttributeError):
            continue
        _native.use_openmp(
            tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        )
        return


if _native is None:
    _warn_if_shadowed()
else:
    _warn_if_stale()
    _share_threads()
