"""Fitting the mixture of a run, and refusing one from which nothing can be learnt."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.special import entr

from gmm_jepa.config import Recipe
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.frames import LogMelStream
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.data.split import hold_out
from gmm_jepa.data.windows import WindowStream
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.gmm.em import EMResult, expectation_maximisation
from gmm_jepa.gmm.partial import PartialFit
from gmm_jepa.gmm.seeding import generators, start_from
from gmm_jepa.gmm.stepwise import stepwise_em, stepwise_start
from gmm_jepa.gmm.stream import FrameStream
from gmm_jepa.ops import EMStatistics, Mixture, gmm_log_likelihood
from gmm_jepa.progress import Bar

SEED_FRAMES = 65_536
"""Frames, drawn uniformly from all, from which mixtures and centroids of log-mel are seeded."""
SEED_S = 1200.0
"""Audio seconds from which clusters of a layer are seeded: 60,000 frames."""
HELDOUT_S = 300.0
"""Audio seconds at most on which the likelihood is followed beside the fit."""
STEPS_BETWEEN_REPORTS = 8
"""Mini-batches of stepwise EM after which it is reported on and its state saved."""
PREFLIGHT_S = 300.0
"""Audio seconds on which a given mixture is looked at before the training."""
MIN_INFORMATION_NATS = 0.1
"""Mutual information of frame and component under which posteriors are no targets."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a mixture is fitted."""

    method: Literal["em", "stepwise"] = "em"
    """em: full passes until `tol` or `max-iter`; stepwise: one pass, an update every mini-batch."""
    step_exponent: float = 0.7
    """Stepwise: mini-batch t (from 0) counts (t + 2)^-exponent; above 0.5, 1 at most."""
    mini_batch_frames: int = 16_384
    """Stepwise: frames of a mini-batch over all processes, about."""
    heldout_fraction: float = 0.01
    """Share of the audio that is not fitted on, for the likelihood that is reported; 0: none."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("step_exponent", 0.5 < self.step_exponent <= 1, "above 0.5, 1 at most"),
            ("mini_batch_frames", self.mini_batch_frames >= 1, "1 or more"),
            ("heldout_fraction", 0 <= self.heldout_fraction < 1, "from 0 to below 1"),
        ):
            if not good:
                raise InputError(f"{name}: expected {expected}, got {getattr(self, name)}")


class FitReport(NamedTuple):
    """How a fit stands."""

    iteration: int
    """passes, or mini-batches of stepwise EM"""
    log_likelihood: float
    """nats a frame of the last pass or mini-batch, before its update"""
    heldout_log_likelihood: float | None
    """nats a frame of audio that is not fitted on, after the update"""
    frames_per_s: float
    """over all processes, since the report before"""
    n_live: int
    """components with the weight of a frame or more"""
    weight_entropy: float
    """of the weights, as a share of the entropy of equal ones"""

    def __str__(self) -> str:
        heldout = self.heldout_log_likelihood
        return (
            f"iteration {self.iteration}: {self.log_likelihood:.4f} nats a frame, "
            f"held out {'none' if heldout is None else f'{heldout:.4f}'}, "
            f"{self.frames_per_s:,.0f} frames/s, {self.n_live} components live, "
            f"weight entropy {self.weight_entropy:.3f}"
        )


OnReport = Callable[[FitReport], None]
NONE_HELD_OUT = FitSettings(heldout_fraction=0.0)


def fit_mixture(
    corpus: Corpus,
    recipe: Recipe,
    rejects: RejectLog,
    peers: Processes,
    settings: FitSettings = NONE_HELD_OUT,
    *,
    partial: Path | None = None,
    on_report: OnReport | None = None,
) -> GaussianMixture:
    """Fit the mixture of a recipe on a corpus by EM; processes share the frames.

    Args:
        corpus: training audio.
        recipe: its `front_end`, `mixture` and `seed` are used.
        rejects: where unreadable audio is recorded.
        peers: this process among its peers, to be called by all of them.
        settings: how.
        partial: where the state of the fit is kept until it ends, and taken up again. The file
            stays, for the caller to remove once the mixture is safe.
        on_report: called in the main process after every iteration, or some mini-batches.

    Raises:
        InputError: too few frames, the mixture tells nothing of them, or `partial` belongs to
            another fit.
    """
    fit = _Fit(corpus, recipe, rejects, peers, settings)
    state = None if partial is None else PartialFit(partial, fit.identity(corpus))
    resumed = None if state is None else state.load()
    _demand_alike(resumed, partial, peers)  # nobody replaces the file before everybody has read it
    with Bar("fitting the mixture", "iteration", shown=peers.is_main) as bar:
        watch = _Watch(fit, bar, state if peers.is_main else None, on_report)
        result = fit.em(resumed, watch) if settings.method == "em" else fit.steps(resumed, watch)
    mixture = blank_mixture(recipe)
    mixture.set_result(result)
    if peers.is_main:
        print(describe(mixture))
    refuse_degenerate(mixture, fit.frames, peers)
    return mixture


def _demand_alike(
    resumed: tuple[EMResult, EMStatistics | None] | None, partial: Path | None, peers: Processes
) -> None:
    """Raise `InputError` in all processes where they go on from different iterations."""
    done = 0 if resumed is None else len(resumed[0].lower_bounds)
    if len(set(peers.gather([done]))) > 1:
        raise InputError(f"{partial}: not all processes see this file; put it where they do")


def blank_mixture(recipe: Recipe) -> GaussianMixture:
    """The mixture of a recipe before it is fitted."""
    config = recipe.mixture
    return GaussianMixture(
        n_components=config.n_components,
        variance_floor=config.variance_floor,
        max_iter=config.max_iter,
        tol=config.tol,
        random_state=recipe.seed,
    )


def total_frames(stream: WindowStream, recipe: Recipe, peers: Processes) -> int:
    """Frames of the streams of all processes.

    Raises:
        InputError: fewer than components.
    """
    n_frames, wanted = peers.total(stream.n_frames), recipe.mixture.n_components
    if n_frames < wanted:
        raise InputError(
            f"mixture.n_components: {wanted} components need as many frames at least, but the "
            f"audio has {n_frames}"
        )
    return n_frames


def common_sample(frames: LogMelStream, peers: Processes) -> Tensor:
    """`SEED_FRAMES` frames (n, D) of all processes, uniformly drawn; the same in every one.

    Raises:
        InputError: none of the audio can be read.
    """
    rows, found = frames.sample(SEED_FRAMES)
    sample = peers.add(rows)[peers.add(found.float()) > 0]
    if not len(sample):
        raise InputError("audio: none of it can be read")
    return sample


class _Fit:
    """One fit: its frames, its start, its two methods."""

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        rejects: RejectLog,
        peers: Processes,
        settings: FitSettings,
    ) -> None:
        self.recipe, self.peers, self.settings = recipe, peers, settings
        fraction, seed = settings.heldout_fraction, recipe.seed
        kept, heldout = np.arange(len(corpus)), np.arange(0)
        if fraction > 0 and len(corpus) > 1:
            kept, heldout = hold_out(corpus, fraction=fraction, by="utterance", seed=seed)
        stream = {"rejects": rejects, "seed": seed, **peers.share}
        max_s, spec = recipe.mixture.max_fit_s, recipe.front_end
        part = corpus if not len(heldout) else corpus.select(kept)
        self.frames = LogMelStream(part, spec, max_s=max_s, **stream)
        self.heldout = None
        if len(heldout):
            self.heldout = LogMelStream(corpus.select(heldout), spec, max_s=HELDOUT_S, **stream)
        self.n_frames = total_frames(self.frames, recipe, peers)

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """What makes an unfinished fit this one."""
        return {
            "audio": corpus.fingerprint,
            "front end": self.recipe.front_end.to_dict(),
            "settings": [asdict(self.recipe.mixture), self.recipe.seed, asdict(self.settings)],
        }

    def start(self) -> Mixture:
        """The same in every process, however many there are."""
        sample, config = common_sample(self.frames, self.peers), self.recipe.mixture
        _, choosing = generators(self.recipe.seed)
        return start_from(sample, config.n_components, config.variance_floor, choosing)

    def em(self, resumed: tuple[EMResult, EMStatistics | None] | None, watch: _Watch) -> EMResult:
        """Full passes."""
        config = self.recipe.mixture
        begun = None if resumed is None else resumed[0]
        return expectation_maximisation(
            FrameStream(self.frames),
            self.start() if begun is None else begun.mixture,
            tol=config.tol,
            max_iter=config.max_iter,
            variance_floor=config.variance_floor,
            all_reduce=self.peers.add_each,
            resume=begun,
            on_result=lambda result: watch(result, config.max_iter, self.n_frames),
        )

    def steps(
        self, resumed: tuple[EMResult, EMStatistics | None] | None, watch: _Watch
    ) -> EMResult:
        """One pass in mini-batches."""
        result, averages = resumed if resumed is not None else stepwise_start(self.start())
        size = self.settings.mini_batch_frames
        n_steps = self.frames.n_mini_batches(size)
        n_before = result.n_frames

        def on_result(result: EMResult) -> None:
            nonlocal n_before
            done = len(result.lower_bounds)
            if done % STEPS_BETWEEN_REPORTS == 0 or done == n_steps:
                watch(result, n_steps, result.n_frames - n_before, averages)
                n_before = result.n_frames

        return stepwise_em(
            self.frames.mini_batches(size, first=len(result.lower_bounds)),
            result,
            averages,
            n_frames=self.n_frames,
            kappa=self.settings.step_exponent,
            variance_floor=self.recipe.mixture.variance_floor,
            all_reduce=self.peers.add_each,
            on_result=on_result,
        )

    def heldout_log_likelihood(self, mixture: Mixture) -> float | None:
        """Nats a frame of the audio held out; None if there is none."""
        if self.heldout is None:
            return None
        total = torch.zeros(2, dtype=torch.float64)
        for frames in self.heldout:
            on_device = Mixture(*(parameter.to(frames.device) for parameter in mixture))
            values = gmm_log_likelihood(frames, on_device)
            total[0] += values.sum(dtype=torch.float64).cpu()
            total[1] += len(values)
        total = self.peers.add(total)
        return float(total[0] / total[1]) if total[1] > 0 else None


class _Watch:
    """Saves a fit and reports on it as it goes."""

    def __init__(
        self, fit: _Fit, bar: Bar, state: PartialFit | None, on_report: OnReport | None
    ) -> None:
        self.fit, self.bar, self.state, self.on_report = fit, bar, state, on_report
        self._began = time.perf_counter()

    def __call__(
        self,
        result: EMResult,
        n_iterations: int,
        n_new_frames: int,
        averages: EMStatistics | None = None,
    ) -> None:
        """After an iteration that looked at `n_new_frames`."""
        seconds = time.perf_counter() - self._began
        done = len(result.lower_bounds)
        if self.state is not None:
            self.state.save(result, averages)
        self.bar(done, n_iterations)
        heldout = self.fit.heldout_log_likelihood(result.mixture)
        if self.on_report is not None and self.fit.peers.is_main:
            weights = result.mixture.log_weights.exp()
            report = FitReport(
                done,
                result.lower_bounds[-1],
                heldout,
                n_new_frames / seconds,
                int((weights * self.fit.n_frames >= 1.0).sum()),
                float(entr(weights).sum()) / math.log(max(len(weights), 2)),
            )
            self.on_report(report)
        self._began = time.perf_counter()


def describe(mixture: GaussianMixture) -> str:
    """One line on how the fit of a mixture ended."""
    if mixture.one_pass_:
        ending = f"one pass of {mixture.n_iter_} mini-batches, the last"
    else:
        ending = "converged" if mixture.converged_ else "stopped"
        ending += f" after {mixture.n_iter_} iterations"
    weights = np.asarray(mixture.weights_, dtype=np.float64)
    used = math.exp(entr(torch.from_numpy(weights)).sum())
    return (
        f"mixture: {ending} at {mixture.lower_bound_:.3f} nats a frame, "
        f"{used:.0f} of {mixture.n_components} components in effective use, "
        f"{mixture.n_reseeded_} re-seeded"
    )


def refuse_degenerate(mixture: GaussianMixture, frames: Iterable[Tensor], peers: Processes) -> None:
    """Refuse targets from which nothing can be learnt; all processes come to one verdict.

    What a frame tells of its component is the entropy of the mean posterior less the mean entropy
    of the posteriors; it is zero where all components are alike and where one takes every frame.

    Args:
        mixture: that makes the targets.
        frames: of this process, maybe none; a few are looked at.
        peers: this process among its peers, to be called by all of them.

    Raises:
        InputError: no process has a frame, or a frame tells less than `MIN_INFORMATION_NATS`, with
            several components.
    """
    K = mixture.n_components
    sums = torch.zeros(K + 2, dtype=torch.float64)
    for batch in itertools.islice(frames, 8):
        posteriors = mixture.predict_proba(batch[::8]).double().cpu()
        sums[:K] += posteriors.sum(0)
        sums[K] += entr(posteriors).sum()
        sums[K + 1] += len(posteriors)
    sums = peers.add(sums)
    if not sums[K + 1]:
        raise InputError("audio: none of it can be read")
    means = sums[: K + 1] / sums[K + 1]
    information = entr(means[:K]).sum() - means[K]
    if mixture.n_components > 1 and not information >= MIN_INFORMATION_NATS:
        raise InputError(
            f"mixture: frames tell {information:.3f} nats of their component, nothing can be "
            f"learnt from that; is the audio silent?"
        )
