"""Fitting the mixture of a run, and refusing one from which nothing can be learnt."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.special import entr

from gmm_jepa.config import Recipe
from gmm_jepa.data.corpus import Corpus
from gmm_jepa.data.frames import LogMelStream
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.errors import InputError
from gmm_jepa.gmm import ConvergenceWarning, GaussianMixture
from gmm_jepa.ops import EMStatistics
from gmm_jepa.progress import Bar
from gmm_jepa.train.distributed import Processes

SEED_S = 1200.0
"""Audio seconds from which the means of a mixture are seeded: 60,000 frames."""
PREFLIGHT_S = 300.0
"""Audio seconds on which a given mixture is looked at before the training."""
MIN_INFORMATION_NATS = 0.1
"""Mutual information of frame and component under which posteriors are no targets."""


def fit_mixture(
    corpus: Corpus, recipe: Recipe, rejects: RejectLog, peers: Processes
) -> GaussianMixture:
    """Fit the mixture of a recipe on a corpus by EM; processes share the frames.

    Args:
        corpus: training audio.
        recipe: its `front_end`, `mixture` and `seed` are used.
        rejects: where unreadable audio is recorded.
        peers: this process among its peers, to be called by all of them.

    Raises:
        InputError: too few frames, or the mixture tells nothing of them.
    """
    config = recipe.mixture
    frames = LogMelStream(
        corpus,
        recipe.front_end,
        rejects=rejects,
        max_s=config.max_fit_s,
        seed=recipe.seed,
        rank=peers.rank,
        world_size=peers.world_size,
        device=peers.device,
    )
    n_frames = int(peers.add(torch.tensor(float(frames.n_frames))))
    if n_frames < config.n_components:
        raise InputError(
            f"mixture.n_components: {config.n_components} components need as many frames at least, "
            f"but the audio has {n_frames}"
        )
    mixture = GaussianMixture(
        n_components=config.n_components,
        variance_floor=config.variance_floor,
        max_iter=config.max_iter,
        tol=config.tol,
        random_state=recipe.seed,
    )
    # Every process starts from the same frames, however many there are.
    start = LogMelStream(corpus, recipe.front_end, rejects=rejects, max_s=SEED_S, seed=recipe.seed)
    start_frames = torch.cat(list(start))
    with (
        Bar("fitting the mixture", "iteration", shown=peers.is_main) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in words below
        mixture.fit(
            frames,
            on_iteration=lambda done, _: bar(done, config.max_iter),
            all_reduce=lambda sums: EMStatistics(*(peers.add(part) for part in sums)),
            gather_rows=lambda _own: start_frames,
        )
    if peers.is_main:
        print(describe(mixture))
    refuse_degenerate(mixture, frames)
    return mixture


def describe(mixture: GaussianMixture) -> str:
    """One line on how the fit of a mixture ended."""
    ending = "converged" if mixture.converged_ else "stopped"
    weights = np.asarray(mixture.weights_, dtype=np.float64)
    used = math.exp(entr(torch.from_numpy(weights)).sum())
    return (
        f"mixture: {ending} after {mixture.n_iter_} iterations at {mixture.lower_bound_:.3f} nats "
        f"a frame, {used:.0f} of {mixture.n_components} components in effective use, "
        f"{mixture.n_reseeded_} re-seeded"
    )


def refuse_degenerate(mixture: GaussianMixture, frames: Iterable[Tensor]) -> None:
    """Refuse targets from which nothing can be learnt.

    What a frame tells of its component is the entropy of the mean posterior less the mean entropy
    of the posteriors; it is zero where all components are alike and where one takes every frame.

    Raises:
        InputError: a frame tells less than `MIN_INFORMATION_NATS`, with several components.
    """
    sample = torch.cat([batch[::8] for batch in itertools.islice(frames, 8)])
    posteriors = mixture.predict_proba(sample).double()
    information = entr(posteriors.mean(0)).sum() - entr(posteriors).sum(1).mean()
    if mixture.n_components > 1 and not information >= MIN_INFORMATION_NATS:
        raise InputError(
            f"mixture: frames tell {information:.3f} nats of their component, nothing can be "
            f"learnt from that; is the audio silent?"
        )
