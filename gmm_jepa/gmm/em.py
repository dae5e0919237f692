"""Expectation-maximisation over a stream of frames, holding O(K D) numbers.

Each iteration is one pass: sum the sufficient statistics of all batches (E-step), then

    w_k = N_k / N,   m_k = S1_k / N_k,   v_k = max(S2_k / N_k - m_k^2, floor)

as scikit-learn's diagonal mixture does, with a variance floor in the place of ``reg_covar``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops import EMStatistics, Mixture, em_statistics

AllReduce = Callable[[EMStatistics], EMStatistics]
OnIteration = Callable[[int, float], None]
OnResult = Callable[["EMResult"], None]

# A component with fewer frames than this is dead and takes half of a heavy one. Frames spread
# over components that lie on one point still give each of them a whole frame or more (N >= K).
DEAD_FRAMES = 0.01
# A component that dies more often than this is left alone, so that EM always comes to rest.
MAX_RESEEDS = 3


@dataclass
class EMResult:
    """Where EM ended and how it got there."""

    mixture: Mixture
    """float64, on the CPU"""
    lower_bounds: list[float] = field(default_factory=list)
    """mean log-likelihood per frame before each M-step, nats"""
    one_pass: bool = False
    """whether there was an M-step after every mini-batch, not after every pass"""
    converged: bool = False
    n_reseeded: int = 0
    n_frames: int = 0
    reseeds: Tensor | None = None
    """(K,) int64, how often each component was given a new place; None: never yet"""


def expectation_maximisation(
    batches: Iterable[Tensor],
    start: Mixture,
    *,
    tol: float,
    max_iter: int,
    variance_floor: float,
    on_iteration: OnIteration | None = None,
    all_reduce: AllReduce | None = None,
    resume: EMResult | None = None,
    on_result: OnResult | None = None,
) -> EMResult:
    """Run EM until the mean log-likelihood changes by less than `tol`.

    Args:
        batches: iterated once an iteration; frames (n, D) on any device.
        start: float64 parameters on the CPU.
        tol: nats per frame.
        max_iter: iterations at most.
        variance_floor: no variance gets below it.
        on_iteration: called with the iteration (from 1) and the mean log-likelihood.
        all_reduce: sums the statistics over processes, each of which streams its own frames.
        resume: where an earlier call stood after some iteration, to go on from instead of `start`.
        on_result: called with where EM stands after every iteration.

    Raises:
        InputError: fewer frames than components, or a likelihood that is not finite.
    """
    K = start.means.shape[0]
    result = resume or EMResult(start, reseeds=torch.zeros(K, dtype=torch.int64, device="cpu"))
    while not result.converged and len(result.lower_bounds) < max_iter:
        iteration = len(result.lower_bounds) + 1
        statistics = expectation(batches, result.mixture)
        if all_reduce is not None:
            statistics = EMStatistics(*all_reduce(statistics))
        check_statistics(statistics, result.mixture, iteration)
        result.n_frames = round(float(statistics.counts.sum()))
        result.mixture = maximisation(statistics, result.mixture, variance_floor)
        result.mixture, n_reseeded = reseed(result.mixture, statistics.counts, result.reseeds)
        result.n_reseeded += n_reseeded
        result.lower_bounds.append(float(statistics.log_likelihood) / result.n_frames)
        previous = result.lower_bounds[-2] if iteration > 1 else -math.inf
        result.converged = abs(result.lower_bounds[-1] - previous) < tol and not n_reseeded
        if on_iteration is not None:
            on_iteration(iteration, result.lower_bounds[-1])
        if on_result is not None:
            on_result(result)
    return result


def expectation(
    batches: Iterable[Tensor],
    mixture: Mixture,
    statistics: Callable[[Tensor, Mixture], EMStatistics] = em_statistics,
) -> EMStatistics:
    """Sufficient statistics of all batches, float64 on the CPU.

    Sums stay on the device of the batches until the last one.

    Args:
        batches: frames (n, D) each, on any device.
        mixture: of K components, on any device.
        statistics: of a batch under the mixture on its device.

    Raises:
        InputError: a batch has not D features.
    """
    K, D = mixture.means.shape
    total = zero_statistics(K, D)
    for frames in batches:
        if frames.shape[1] != D:
            raise InputError(f"X: expected {D} features, got {frames.shape[1]}")
        device = frames.device
        mixture = Mixture(*(parameter.to(device) for parameter in mixture))
        part = statistics(frames, mixture)
        total = EMStatistics(*(t.to(device) + p for t, p in zip(total, part)))
    return EMStatistics(*(t.cpu() for t in total))


def zero_statistics(K: int, D: int) -> EMStatistics:
    """Statistics of no frames, float64 on the CPU."""
    shapes = ((K,), (K, D), (K, D), ())
    return EMStatistics(
        *(torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes)
    )


def maximisation(statistics: EMStatistics, previous: Mixture, variance_floor: float) -> Mixture:
    """New parameters from statistics; a component without frames keeps its mean and variance."""
    epsilon = torch.finfo(torch.float64).eps
    counts = statistics.counts + 10.0 * epsilon  # as scikit-learn: no division by zero
    alive = (statistics.counts >= DEAD_FRAMES)[:, None]
    means = statistics.first / counts[:, None]
    variances = statistics.second / counts[:, None] - means.square()
    return Mixture(
        (counts / counts.sum()).log(),
        torch.where(alive, means, previous.means),
        torch.where(alive, variances, previous.variances).clamp_min(variance_floor),
    )


def reseed(mixture: Mixture, counts: Tensor, reseeds: Tensor) -> tuple[Mixture, int]:
    """Give every dead component half of a heavy one; returns the mixture and how many were dead.

    The two halves stand half a standard deviation to either side of the old mean. The rule needs
    no frames, so it is the same in every process. `reseeds` (K,) counts how often each component
    was given a new place, and is updated.
    """
    dead = ((counts < DEAD_FRAMES) & (reseeds < MAX_RESEEDS)).nonzero().flatten()
    heavy = counts.argsort(descending=True, stable=True)
    heavy = heavy[counts[heavy] >= 2.0 * DEAD_FRAMES][: dead.numel()]
    dead = dead[: heavy.numel()]
    if not dead.numel():
        return mixture, 0
    log_weights, means, variances = (parameter.clone() for parameter in mixture)
    step = 0.5 * variances[heavy].sqrt()
    log_weights[heavy] -= math.log(2.0)
    means[dead], means[heavy] = means[heavy] + step, means[heavy] - step
    log_weights[dead], variances[dead] = log_weights[heavy], variances[heavy]
    reseeds[dead] += 1
    return Mixture(log_weights.log_softmax(0), means, variances), int(dead.numel())


def check_statistics(
    statistics: EMStatistics, mixture: Mixture, iteration: int, *, any_number: bool = False
) -> None:
    """Refuse statistics that are not finite, or, unless `any_number`, of fewer frames than K.

    Raises:
        InputError: naming the component.
    """
    K = mixture.means.shape[0]
    finite = torch.isfinite(statistics.first) & torch.isfinite(statistics.second)
    bad = (~finite.all(1) | ~torch.isfinite(statistics.counts)).nonzero().flatten().tolist()
    if bad or not math.isfinite(float(statistics.log_likelihood)):
        raise InputError(
            f"X: component {bad[0] if bad else 'none'} is not finite after iteration {iteration}, "
            "although every frame is: values are too large to square; rescale the frames"
        )
    n_frames = round(float(statistics.counts.sum()))
    if n_frames < K and not any_number:
        raise InputError(
            f"Expected n_samples >= n_components but got n_components = {K}, n_samples = {n_frames}"
        )
