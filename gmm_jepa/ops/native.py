"""The native module's kernels in the place of the torch ones on CPUs, and of EM on CUDA devices.

``gmm_jepa._native`` (sources in ``csrc/``) takes addresses, sizes and strides, and mixtures that it
prepared itself. Where it was not built nothing is registered here, and the operators run on torch
alone. ``GMM_JEPA_CUDA_EM=0`` when this is imported leaves its CUDA part out.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops import cuda_em
from gmm_jepa.ops.em import (
    _em_statistics,
    _kmeans_assign,
    _kmeans_statistics,
    em_statistics_reference,
    kmeans_assign_reference,
    kmeans_statistics_reference,
)
from gmm_jepa.ops.log_mel import _log_mel, log_mel_reference
from gmm_jepa.ops.mixture import Mixture, check_frames
from gmm_jepa.ops.packed import MixturesByValue, PackedMixtures, array_of
from gmm_jepa.ops.posterior import (
    _log_likelihood,
    _posterior,
    _topk,
    log_likelihood_reference,
    posterior_reference,
    topk_reference,
)

try:
    from gmm_jepa import _native
except ImportError as error:
    _native = None
    _why_absent = str(error)

_WIDE = (torch.float32, torch.float64)
_POSTERIOR_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# Both kernels and their emulation are made for mixtures up to this size.
_MOST_COMPONENTS, _MOST_FEATURES = 8192, 512
_CUDA_SWITCH = "GMM_JEPA_CUDA_EM"
_PF_FORKNOEXEC = 0x40  # of Linux, include/linux/sched.h

_packed = PackedMixtures(cuda_em.pack, n_kept=2)

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


def status() -> str:
    """One line for people: live with which instruction set, or why not."""
    if _native is None:
        return f"off: {_why_absent}"
    best, *others = instruction_sets()
    return f"live ({_instruction_set or best}; can also run {', '.join(others) or 'none'})"


def cuda_architectures() -> str:
    """Targets that the module's CUDA part was built for, comma separated; empty without one."""
    return getattr(_native, "cuda_architectures", "")


def cuda_status() -> str:
    """One line for people: whether the CUDA part of the module is built and used."""
    if _native is None:
        return f"off: {_why_absent}"
    if not cuda_architectures():
        return "off: built without nvcc"
    built = f"built for {cuda_architectures()}"
    if os.environ.get(_CUDA_SWITCH) == "0":
        return f"off: {built}; {_CUDA_SWITCH}=0 is set"
    return f"on, {built}" if _native.cuda_device_count() else f"off: {built}; no CUDA device"


def is_intel() -> bool:
    """Whether the processor is Intel's, as far as the module can tell."""
    return _native is not None and _native.is_intel()


def call(name: str, *arguments: object) -> Any:
    """A function of the module, on torch's number of threads and the chosen instruction set."""
    return getattr(_native, name)(*arguments, torch.get_num_threads(), _instruction_set)


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


def em_statistics(
    frames: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sufficient statistics, see `gmm_jepa.ops.em.em_statistics`."""
    K, D = means.shape
    mixture = Mixture(log_weights, means, variances)
    if not K or not D:
        return em_statistics_reference(frames, *mixture)
    out = _statistics(K, D, frames.device)
    into = tuple(o.data_ptr() for o in out)
    _of_mixture("em_statistics", frames, mixture, into, kept=_screened_for_em)
    return out


def em_statistics_cuda(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`em_statistics` on a CUDA device; `hard` gives all of a frame to its best component."""
    K, D = means.shape
    mixture = (log_weights, means, variances)
    if not hard and not _cuda_covers(K, D):
        return em_statistics_reference(frames, *mixture)
    x, operands = _frames(frames), _packed(cuda_em.Mixture(*mixture))
    out = _statistics(K, D, x.device)
    n_bytes = _native.em_workspace_bytes(K, D)
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(x.device)
    _native.em_statistics_cuda(
        _matrix(x),
        x.dtype == torch.float64,
        operands.addresses(),
        tuple(o.data_ptr() for o in out),
        hard,
        cuda_em.MARGIN_NATS,
        (workspace.data_ptr(), n_bytes),
        (x.device.index, stream.cuda_stream),
    )
    return out


def kmeans_statistics_cuda(
    frames: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kmeans_statistics` on a CUDA device: of a mixture of equal weights and variances of one."""
    K, D = centroids.shape
    if not _cuda_covers(K, D):
        return kmeans_statistics_reference(frames, centroids)
    means, ones = centroids.double(), torch.ones_like(centroids, dtype=torch.float64)
    log_weight = -math.log(K)
    log_weights = means.new_full((K,), log_weight)
    *sums, best = em_statistics_cuda(frames, log_weights, means, ones, hard=True)
    on_a_mean = log_weight - 0.5 * D * math.log(2.0 * math.pi)
    return *sums, 2.0 * (best - len(frames) * on_a_mean)


def em_statistics_emulated(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernels' algorithm, serially on the CPU; for tests."""
    K, D = means.shape
    x, operands = _frames(frames), cuda_em.pack(cuda_em.Mixture(log_weights, means, variances))
    out = _statistics(K, D, x.device)
    _native.em_statistics_emulated(
        _matrix(x),
        x.dtype == torch.float64,
        operands.addresses(),
        tuple(o.data_ptr() for o in out),
        hard,
        cuda_em.MARGIN_NATS,
    )
    return out


def posterior(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    temperature: float,
    log: bool,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Posteriors (n, K), exact in either precision; see `gmm_jepa.ops.posterior.gmm_posterior`.

    The logarithm is needed of components that carry nothing, too: torch computes it.
    """
    K, D = means.shape
    mixture = Mixture(log_weights, means, variances)
    if log or not K or not D:
        return posterior_reference(frames, *mixture, temperature, log, precision, out_dtype)
    dtype = out_dtype if out_dtype in _POSTERIOR_TYPES else torch.float32
    out = torch.empty((len(frames), K), dtype=dtype)
    name = _POSTERIOR_TYPES[dtype]
    _of_mixture("posterior", frames, mixture, temperature, out.data_ptr(), name)
    return out.to(out_dtype)


def log_likelihood(
    frames: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor, precision: str
) -> Tensor:
    """Log-densities (n,), exact in either precision."""
    mixture = Mixture(log_weights, means, variances)
    if not means.numel():
        return log_likelihood_reference(frames, *mixture, precision)
    out = torch.empty(len(frames), dtype=torch.float64)
    _of_mixture("log_likelihood", frames, mixture, out.data_ptr())
    return out if frames.dtype == torch.float64 else out.float()


def topk(
    frames: Tensor,
    log_weights: Tensor,
    means: Tensor,
    variances: Tensor,
    k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The k largest posteriors (n, k) and their components; ties go to the first component."""
    mixture = Mixture(log_weights, means, variances)
    if not means.numel():
        return topk_reference(frames, *mixture, k, temperature)
    posteriors = torch.empty((len(frames), k), dtype=torch.float32)
    indices = torch.empty((len(frames), k), dtype=torch.int64)
    into = (posteriors.data_ptr(), indices.data_ptr())
    _of_mixture("topk", frames, mixture, k, temperature, *into)
    return posteriors, indices


def kmeans_assign(frames: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroids (n,) and squared distances (n,) float32."""
    K, D = centroids.shape
    if not K or not D:
        return kmeans_assign_reference(frames, centroids)
    means = array_of(centroids).astype(np.float64)
    # Any variance gives the same labels; a tenth of the centroids' own keeps the screen's scale
    # of nats to that of distances.
    with np.errstate(over="ignore", invalid="ignore"):
        variance = np.full((K, D), np.maximum(0.1 * means.var(0).mean(), 1e-30))
    mixture = Mixture(*map(torch.from_numpy, (np.zeros(K), means, variance)))
    labels = torch.empty(len(frames), dtype=torch.int64)
    distances = torch.empty(len(frames), dtype=torch.float32)
    _of_mixture("nearest", frames, mixture, labels.data_ptr(), distances.data_ptr())
    return labels, distances


def log_mel(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    hop: int,
    floor: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Log-mel frames (B, S // hop + 1, n_mels), in float32 but for a float64 waveform."""
    (B, S), n_mels = waveform.shape, filters.shape[1]
    n_fft = window.shape[0]
    # below float32's normal range a logarithm by parts of the number is not exact
    plain = waveform.dtype == torch.float64 or not floor >= 1e-30
    if plain or not (B and S and n_mels and _native.log_mel_supports(n_fft)):
        return log_mel_reference(waveform, lengths_samples, window, filters, hop, floor, out_dtype)
    bins = n_fft // 2 + 1
    x = waveform if waveform.dtype in (torch.float32, torch.int16) else waveform.float()
    window, filters = window.float().contiguous(), filters.float().contiguous()
    check("log_mel", (window, filters), ((n_fft,), (bins, n_mels)))
    lengths = lengths_of(lengths_samples, x)
    out = torch.empty((B, S // hop + 1, n_mels), dtype=torch.float32)
    call(
        "log_mel",
        _matrix(x),
        x.dtype == torch.int16,
        lengths.data_ptr(),
        (window.data_ptr(), filters.data_ptr(), n_fft, n_mels, hop, floor),
        out.data_ptr(),
    )
    return out.to(out_dtype)


def _was_forked() -> bool:
    """Whether this process was forked and no program was started in it, as far as Linux tells."""
    try:
        status = Path("/proc/self/stat").read_text()
    except OSError:
        return False
    flags = int(status.rpartition(")")[2].split()[6])
    return bool(flags & _PF_FORKNOEXEC)


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


def _cuda_covers(K: int, D: int) -> bool:
    return 1 <= K <= _MOST_COMPONENTS and 1 <= D <= _MOST_FEATURES


def _statistics(K: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty(shape, dtype=torch.float64, device=device)
        for shape in ((K,), (K, D), (K, D), ())
    )


def _frames(frames: Tensor) -> Tensor:
    """Frames as float32 or float64; the half types are exact in float32."""
    return frames if frames.dtype in _WIDE else frames.float()


def _screen(mixture: Mixture, instruction_set: str) -> Any:
    """The mixture prepared by the module."""
    parameters = [np.ascontiguousarray(array_of(p), np.float64) for p in mixture]
    addresses = (*(p.ctypes.data for p in parameters), len(mixture.means))
    return _native.ScreenedMixture(addresses, mixture.means.shape[1], instruction_set)


# An iteration of EM has a mixture of its own, whatever the number of batches: to keep more of them
# costs fresh memory each time.
_screened, _screened_for_em = (MixturesByValue(_screen, n_kept) for n_kept in (8, 1))


def _of_mixture(
    name: str,
    frames: Tensor,
    mixture: Mixture,
    *arguments: object,
    kept: MixturesByValue = _screened,
) -> None:
    """A function of the module on frames under a mixture, on torch's number of threads.

    Raises:
        InputError: shapes or devices disagree, as where the operator is called past its function.
    """
    check_frames(frames, mixture)
    if frames.ndim != 2:
        raise InputError(f"frames: expected (N, D), got {tuple(frames.shape)}")
    x, screened = _frames(frames), kept(mixture, _instruction_set)
    is_float64 = x.dtype == torch.float64
    function = getattr(_native, name)
    function(_matrix(x), is_float64, screened, *arguments, torch.get_num_threads())


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    return (x.data_ptr(), *x.shape, *x.stride())


if _native is not None:
    _share_threads()
    _em_statistics.register_kernel("cpu")(em_statistics)
    _kmeans_assign.register_kernel("cpu")(kmeans_assign)
    _log_mel.register_kernel("cpu")(log_mel)
    _posterior.register_kernel("cpu")(posterior)
    _log_likelihood.register_kernel("cpu")(log_likelihood)
    _topk.register_kernel("cpu")(topk)
    if cuda_architectures() and os.environ.get(_CUDA_SWITCH) != "0":
        _em_statistics.register_kernel("cuda")(em_statistics_cuda)
        _kmeans_statistics.register_kernel("cuda")(kmeans_statistics_cuda)
