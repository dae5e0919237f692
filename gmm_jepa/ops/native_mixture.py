"""The native module's kernels of mixtures on CPUs, and of EM on CUDA; see `gmm_jepa.ops.native`."""

from __future__ import annotations

import math
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
from gmm_jepa.ops.mixture import Mixture, check_frames
from gmm_jepa.ops.native import (
    _native,
    chosen_set,
    instruction_sets,
    matrix_of,
    runs_em_on,
    uses_cuda,
)
from gmm_jepa.ops.packed import MixturesByValue, PackedMixtures, array_of
from gmm_jepa.ops.posterior import (
    _log_likelihood,
    _posterior,
    _topk,
    log_likelihood_reference,
    posterior_reference,
    topk_reference,
)

_WIDE = (torch.float32, torch.float64)
_POSTERIOR_TYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# Both kernels of CUDA's EM and their emulation are made for mixtures up to this size.
_MOST_COMPONENTS, _MOST_FEATURES = 8192, 512

_packed = PackedMixtures(cuda_em.pack, n_kept=2)


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
    if not hard and not _cuda_covers(frames, K):
        return em_statistics_reference(frames, *mixture)
    x, operands = _frames(frames), _packed(Mixture(*mixture))
    out = _statistics(K, D, x.device)
    n_bytes = _native.em_workspace_bytes(K, D)
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(x.device)
    with torch.cuda.device_of(x):
        _native.em_statistics_cuda(
            matrix_of(x),
            x.dtype == torch.float64,
            operands.addresses(),
            tuple(o.data_ptr() for o in out),
            (hard, cuda_em.MARGIN_NATS),
            (workspace.data_ptr(), n_bytes),
            (x.device.index, stream.cuda_stream),
        )
    return out


def kmeans_statistics_cuda(
    frames: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kmeans_statistics` on a CUDA device: of a mixture of equal weights and variances of one."""
    K, D = centroids.shape
    if not _cuda_covers(frames, K):
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
    x, operands = _frames(frames), cuda_em.pack(Mixture(log_weights, means, variances))
    out = _statistics(K, D, x.device)
    _native.em_statistics_emulated(
        matrix_of(x),
        x.dtype == torch.float64,
        operands.addresses(),
        tuple(o.data_ptr() for o in out),
        (hard, cuda_em.MARGIN_NATS),
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
    _of_mixture("kmeans_assign", frames, mixture, labels.data_ptr(), distances.data_ptr())
    return labels, distances


def _cuda_covers(frames: Tensor, K: int) -> bool:
    """Whether the module has kernels for so many components of such frames, on their device."""
    D = frames.shape[1]
    is_small = 1 <= K <= _MOST_COMPONENTS and 1 <= D <= _MOST_FEATURES
    return is_small and runs_em_on(frames.device.index)


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
    sizes = mixture.means.shape
    return _native.ScreenedMixture((*(p.ctypes.data for p in parameters), *sizes), instruction_set)


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
    x, screened = _frames(frames), kept(mixture, chosen_set())
    is_float64 = x.dtype == torch.float64
    function = getattr(_native, name)
    function(matrix_of(x), is_float64, screened, *arguments, torch.get_num_threads())


if instruction_sets():
    _em_statistics.register_kernel("cpu")(em_statistics)
    _kmeans_assign.register_kernel("cpu")(kmeans_assign)
    _posterior.register_kernel("cpu")(posterior)
    _log_likelihood.register_kernel("cpu")(log_likelihood)
    _topk.register_kernel("cpu")(topk)
if uses_cuda():
    _em_statistics.register_kernel("cuda")(em_statistics_cuda)
    _kmeans_statistics.register_kernel("cuda")(kmeans_statistics_cuda)
