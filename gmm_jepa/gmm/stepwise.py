"""Stepwise (online) EM: an M-step after every mini-batch, for a fit in one pass.

With s the statistics a frame, averaged over all frames so far, and s_t those of mini-batch t:

    s <- (1 - eta_t) s + eta_t s_t,   eta_t = (t + 2)^-kappa,   0.5 < kappa <= 1

Cappe and Moulines 2009; the step sizes are those of Liang and Klein 2009. A larger kappa forgets
the start more slowly and averages over more frames.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gmm_jepa.gmm.em import (
    AllReduce,
    EMResult,
    OnResult,
    check_statistics,
    expectation,
    maximisation,
    reseed,
)
from gmm_jepa.ops import EMStatistics, Mixture


def stepwise_em(
    mini_batches: Iterable[Iterable[Tensor]],
    start: EMResult,
    averages: EMStatistics,
    *,
    n_frames: int,
    kappa: float,
    variance_floor: float,
    all_reduce: AllReduce | None = None,
    on_result: OnResult | None = None,
) -> EMResult:
    """Go through the mini-batches once.

    Args:
        mini_batches: those not yet seen; each an iterable of frames (n, D). Every process gives
            the same number of them, its own may be empty.
        start: `stepwise_start`'s, or where an earlier call stood.
        averages: statistics a frame; `stepwise_start`'s, or the earlier call's. Updated in place.
        n_frames: frames of the whole pass, which a component's share is measured against.
        kappa: exponent of the step sizes.
        variance_floor: no variance gets below it.
        all_reduce: sums the statistics over processes.
        on_result: called after every mini-batch; ``lower_bounds`` has one value for each.

    Raises:
        InputError: a likelihood that is not finite.
    """
    result = start
    for frames in mini_batches:
        step = len(result.lower_bounds)
        statistics = expectation(frames, result.mixture)
        if all_reduce is not None:
            statistics = EMStatistics(*all_reduce(statistics))
        n_new = float(statistics.counts.sum())
        if n_new < 0.5:  # all of it could not be read
            result.lower_bounds.append(result.lower_bounds[-1] if step else float("nan"))
            continue
        check_statistics(statistics, result.mixture, step + 1, any_number=True)
        eta = (step + 2.0) ** -kappa
        for average, part in zip(averages, statistics):
            average.mul_(1.0 - eta).add_(part, alpha=eta / n_new)
        scaled = EMStatistics(*(average * n_frames for average in averages))
        result.mixture = maximisation(scaled, result.mixture, variance_floor)
        moved, n_reseeded = reseed(result.mixture, scaled.counts, result.reseeds)
        if n_reseeded:  # the averages move with the components
            for average, new in zip(averages, statistics_of(moved)):
                average.copy_(new)
        result.mixture = moved
        result.n_reseeded += n_reseeded
        result.n_frames += round(n_new)
        result.lower_bounds.append(float(statistics.log_likelihood) / n_new)
        if on_result is not None:
            on_result(result)
    return result


def stepwise_start(mixture: Mixture) -> tuple[EMResult, EMStatistics]:
    """Where the first mini-batch finds a mixture: nothing seen, the averages its own moments."""
    reseeds = torch.zeros(mixture.means.shape[0], dtype=torch.int64, device="cpu")
    return EMResult(mixture, reseeds=reseeds, one_pass=True), statistics_of(mixture)


def statistics_of(mixture: Mixture) -> EMStatistics:
    """Statistics a frame that the mixture itself would give."""
    weights = mixture.log_weights.exp()
    first = weights[:, None] * mixture.means
    second = weights[:, None] * (mixture.means.square() + mixture.variances)
    return EMStatistics(weights, first, second, weights.new_zeros(()))
