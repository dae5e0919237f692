"""The main job, stage by stage: read the audio, fit the mixture, train, evaluate, report.

Every stage leaves its result in the run folder and is passed over when that is there already, so a
run that was interrupted anywhere goes on by being started again.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.special import entr

from gmm_jepa.config import Recipe, Sources
from gmm_jepa.data.corpus import Corpus, find_readable, open_corpus
from gmm_jepa.data.frames import LogMelStream
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.data.split import hold_out
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.evaluation import Evaluation, evaluate
from gmm_jepa.evaluate.report import write_report
from gmm_jepa.files import read_json, write_json
from gmm_jepa.gmm import ConvergenceWarning, GaussianMixture
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.ops import EMStatistics
from gmm_jepa.progress import Bar, Stages
from gmm_jepa.train import checkpoint
from gmm_jepa.train.distributed import Processes
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import read_metrics
from gmm_jepa.train.state import initial_model
from gmm_jepa.train.trainer import TrainOutcome, train

SEED_S = 1200.0
"""Audio seconds from which the means of a mixture are seeded: 60,000 frames."""
PREFLIGHT_S = 300.0
"""Audio seconds on which a given mixture is looked at before the training."""
MIN_INFORMATION_NATS = 0.1
"""Mutual information of frame and component under which posteriors are no targets."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """The usable audio of a run."""

    train: Corpus
    heldout: Corpus


class Run:
    """One run in its folder.

    Args:
        folder: where it lies.
        sources: its audio.
        recipe: its settings.
        peers: this process among its peers; the main one writes the files.
    """

    def __init__(
        self, folder: RunFolder, sources: Sources, recipe: Recipe, peers: Processes
    ) -> None:
        self.folder = folder
        self.sources = sources
        self.recipe = recipe
        self.peers = peers
        self.rejects = RejectLog(folder.rejects if peers.is_main else None)

    def audio(self) -> Audio:
        """Open the corpora, read all audio once, set the unusable aside, hold a part out.

        Raises:
            InputError: nothing usable, too much unusable, or audio other than the run began with.
        """
        train_part = self._usable("audio", self.sources.audio, self.sources.weights)
        if self.sources.heldout_audio:
            return Audio(
                train=train_part,
                heldout=self._usable("heldout_audio", self.sources.heldout_audio, ()),
            )
        config = self.recipe.data
        kept, heldout = hold_out(
            train_part,
            fraction=config.heldout_fraction,
            by=config.heldout_by,
            seed=self.recipe.seed,
        )
        return Audio(train=train_part.select(kept), heldout=train_part.select(heldout))

    def _usable(self, name: str, paths: tuple[str, ...], weights: tuple[float, ...]) -> Corpus:
        """One argument's corpus without what cannot be read; a resumed run does not read it again.

        The processes read a share each. What is unusable is remembered in the run folder with the
        fingerprint of the corpus, so that all of them, now and later, train on the same audio.
        """
        listed = RejectLog(None)
        corpus = open_corpus(paths, rejects=listed, weights=weights or None)
        remembered = self.folder.root / f"{name}.json"
        if not remembered.exists():
            unreadable, rejects = self._read_all(name, corpus)
            if self.peers.is_main:
                rejects = [*listed, *rejects]
                self.rejects.extend(rejects)
                self.rejects.check(
                    len(corpus) + len(listed),
                    self.recipe.data.max_bad_fraction,
                    n_bad=len(rejects),
                )
                summary = {
                    "fingerprint": corpus.fingerprint,
                    "utterances": len(corpus),
                    "seconds": round(corpus.total_s, 3),
                    "unreadable": unreadable,
                    "rejects": rejects,
                }
                write_json(remembered, summary)
            self.peers.wait()
        seen = read_json(remembered)
        if seen["fingerprint"] != corpus.fingerprint:
            raise InputError(
                f"{name}: its content changed since this run began; "
                "start a new run in another folder"
            )
        self.rejects.extend(Reject(*fields) for fields in seen["rejects"])
        good = np.ones(len(corpus), dtype=bool)
        good[seen["unreadable"]] = False
        if not good.any():
            raise InputError(f"{name}: no usable audio; {self.rejects.summary()}")
        return corpus.select(good)

    def _read_all(self, name: str, corpus: Corpus) -> tuple[list[int], list[Reject]]:
        """Which utterances of the whole corpus cannot be read, and why; known to every process."""
        share = np.arange(self.peers.rank, len(corpus), self.peers.world_size)
        rejects = RejectLog(None)
        shown, what = self.peers.is_main, f"reading {name.replace('_', ' ')}"
        with Bar(what, "utterance", shown=shown) as progress:
            good = find_readable(
                corpus.select(share), rejects, workers=self.recipe.data.workers, progress=progress
            )
        unreadable = sorted(self.peers.gather(share[~good].tolist()))
        return unreadable, self.peers.gather(list(rejects))

    def mixture(self, corpus: Corpus) -> GaussianMixture:
        """The run's mixture: read if it is there, else fitted by all processes together."""
        path, recipe = self.folder.mixture, self.recipe
        if not path.exists():
            mixture = fit_mixture(corpus, recipe, self.rejects, self.peers)
            if self.peers.is_main:
                mixture.save(path, front_end=recipe.front_end)
            self.peers.wait()
        return self._load_mixture(path)

    def _load_mixture(self, path: Path) -> GaussianMixture:
        """Read a mixture that fits the recipe."""
        mixture = GaussianMixture.load(path, front_end=self.recipe.front_end)
        n_components = self.recipe.mixture.n_components
        if mixture.n_components != n_components:
            raise InputError(
                f"{path}: a mixture of {mixture.n_components} components, "
                f"but the recipe says {n_components}"
            )
        return mixture

    def take_mixture(self, path: Path, corpus: Corpus) -> None:
        """Use a mixture that was fitted before, instead of fitting one on `corpus`.

        Raises:
            InputError: it does not fit the recipe, or the run has another one.
        """
        given = self._load_mixture(path)
        if self.folder.mixture.exists():
            own = self._load_mixture(self.folder.mixture)
            if not np.array_equal(own.means_, given.means_):
                raise InputError(f"gmm: this run has a mixture already, other than {path}")
        else:
            sample = LogMelStream(
                corpus, self.recipe.front_end, rejects=self.rejects, max_s=PREFLIGHT_S
            )
            refuse_degenerate(given, sample)
            if self.peers.is_main:
                given.save(self.folder.mixture, front_end=self.recipe.front_end)
        self.peers.wait()

    def train(self, corpus: Corpus, mixture: GaussianMixture) -> TrainOutcome:
        """Train to the recipe's last step, or go on from the newest checkpoint."""
        return train(self.folder, self.recipe, corpus, mixture, self.peers, rejects=self.rejects)

    def evaluate(self, audio: Audio, mixture: GaussianMixture) -> Evaluation:
        """Measure the newest checkpoint on held-out audio and write numbers, plots and report.

        Raises:
            InputError: there is no checkpoint.
        """
        recipe, device = self.recipe, self.peers.device
        with Stages() as progress:
            evaluation = evaluate(
                self.model().to(device),
                initial_model(recipe).eval().to(device),
                mixture,
                recipe.front_end,
                audio.train,
                audio.heldout,
                max_train_s=recipe.evaluate.max_train_s,
                max_test_s=recipe.evaluate.max_test_s,
                temperature=recipe.objective.temperature,
                shift_samples=recipe.target_shift_samples,
                seed=recipe.seed,
                progress=progress,
            )
        write_report(self.folder.root, evaluation, read_metrics(self.folder.metrics))
        return evaluation

    def model(self) -> JepaModel:
        """The model of the newest checkpoint."""
        latest = checkpoint.newest(self.folder.checkpoints)
        if latest is None:
            raise InputError(f"{self.folder.root}: no checkpoint yet; train first")
        model = initial_model(self.recipe)
        checkpoint.load_weights(latest, model)
        return model.eval()


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


def open_run(root: Path, sources: Sources, recipe: Recipe, peers: Processes) -> Run:
    """Begin a run in a folder, or go on with the one that is there.

    Raises:
        InputError: the folder holds something else.
    """
    folder = RunFolder(root)
    if peers.is_main:
        folder.open(sources, recipe)
    peers.wait()
    return Run(folder, sources, recipe, peers)
