"""The main job, stage by stage: read the audio, make the labels, train, evaluate, report.

Every stage leaves its result in the run folder and all but the evaluation, which is made anew, are
passed over when that is there already: a run that was interrupted anywhere goes on by being started
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmm_jepa.config import Recipe, Sources
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.corpus import find_readable, open_corpus
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.data.split import hold_out
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.evaluation import Evaluation, evaluate
from gmm_jepa.evaluate.report import write_report
from gmm_jepa.files import read_json, write_json
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.labelling import Labeller
from gmm_jepa.objectives.build import Labels, initial_model
from gmm_jepa.progress import Bar, Stages
from gmm_jepa.train import checkpoint
from gmm_jepa.train.advice import before_training
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.metrics import read_metrics
from gmm_jepa.train.trained import newest
from gmm_jepa.train.trainer import TrainOutcome, train


@dataclass(frozen=True, kw_only=True)
class Audio:
    """The usable audio of a run."""

    train: Corpus
    heldout: Corpus


MOST_COMPARED = 100_000
"""Utterances up to which held-out ones are looked for among those to train on: a second or two."""


def n_in_both(train: Corpus, heldout: Corpus) -> int | None:
    """Held-out utterances that are the same part of the same file as one to train on.

    None, not known, of corpora that have more utterances than `MOST_COMPARED`.
    """
    if len(train) + len(heldout) > MOST_COMPARED:
        return None

    def part(corpus: Corpus, i: int) -> tuple[object, ...]:
        entry = corpus.entry(i)
        return entry["audio_filepath"], entry.get("offset") or 0, int(corpus.durations_samples[i])

    trained = {part(train, i) for i in range(len(train))}
    return sum(part(heldout, i) in trained for i in range(len(heldout)))


class Run:
    """One run in its folder.

    Args:
        folder: where it lies.
        sources: its audio.
        recipe: its settings.
        peers: this process among its peers; the main one writes the files.
        audio_may_differ: until something was made of it, other audio takes the place of what was
            read before.
    """

    def __init__(
        self,
        folder: RunFolder,
        sources: Sources,
        recipe: Recipe,
        peers: Processes,
        *,
        audio_may_differ: bool = False,
    ) -> None:
        self._audio_may_differ = audio_may_differ
        self.folder = folder
        self.sources = sources
        self.recipe = recipe
        self.peers = peers
        self.rejects = RejectLog(folder.rejects if peers.is_main else None)
        self._labeller = Labeller(folder, recipe, self.rejects, peers)

    def audio(self) -> Audio:
        """Open the corpora, read all audio once, set the unusable aside, hold a part out.

        What is packed was read when it was packed, and is not read again.

        Raises:
            InputError: nothing usable, too much unusable, or audio other than the run began with.
        """
        for path in self.sources.heldout_audio:  # told before the other audio is read
            if not Path(path).exists():
                raise InputError(f"heldout_audio: {path}: no such file or folder")
        train_part = self._usable("audio", self.sources.audio, self.sources.weights)
        heldout_part = None
        if self.sources.heldout_audio:
            heldout_part = self._usable("heldout_audio", self.sources.heldout_audio, ())
        if self.peers.is_main and self.folder.note(self.sources, self.recipe):
            paths = ", ".join((*self.sources.audio, *self.sources.heldout_audio))
            print(f"the same audio as before, by its names and lengths, is read from {paths}")
        if heldout_part is None:
            audio = _with_a_part_held_out(train_part, self.recipe)
        else:
            audio = Audio(train=train_part, heldout=heldout_part)
        if self.peers.is_main and (n_heard := n_in_both(audio.train, audio.heldout)):
            print(f"warning: {n_heard} held-out utterances are in the training audio, too")
        return audio

    def _usable(self, name: str, paths: tuple[str, ...], weights: tuple[float, ...]) -> Corpus:
        """One argument's corpus without what cannot be read; a resumed run does not read it again.

        The processes read a share each. What is unusable is remembered in the run folder with the
        fingerprint of the corpus, so that all of them, now and later, train on the same audio.
        """
        listed = RejectLog(None)
        corpus = open_corpus(paths, rejects=listed, weights=weights or None)
        remembered = self.folder.root / f"{name}.json"
        if self.peers.of_main(lambda: self._is_unread(name, corpus)):
            unreadable, rejects = self._read_all(name, corpus)
            if self.peers.is_main:
                rejects = [*listed, *rejects]
                self.rejects.extend(rejects)
                self.rejects.check(
                    len(corpus) + listed.count,
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
        seen = self.peers.of_main(lambda: read_json(remembered))
        if seen["fingerprint"] != corpus.fingerprint:
            raise InputError(
                f"{name}: {', '.join(paths)}: its content changed since this run began, when it "
                f"had {seen['utterances']:,} utterances of {seen['seconds']:,.1f} s; now "
                f"{len(corpus):,} of {corpus.total_s:,.1f} s: start a new run in another folder"
            )
        self.rejects.extend(Reject(*fields) for fields in seen["rejects"])
        readable = _readable(corpus, seen["unreadable"])
        if not len(readable):
            raise InputError(f"{name}: no usable audio; {self.rejects.summary()}")
        return readable

    def _is_unread(self, name: str, corpus: Corpus) -> bool:
        """Whether nothing is known of the audio; what was, goes where it changed before it told."""
        remembered = self.folder.root / f"{name}.json"
        if not remembered.exists():
            return True
        if not self._audio_may_differ or self.folder.has_results():
            return False
        if read_json(remembered)["fingerprint"] == corpus.fingerprint:
            return False
        for path in (remembered, *(self.folder.partial_fits() if name == "audio" else ())):
            path.unlink()
        return True

    def _read_all(self, name: str, corpus: Corpus) -> tuple[list[int], list[Reject]]:
        """Which utterances of the whole corpus cannot be read, and why; known to every process."""
        share = np.flatnonzero(~corpus.is_decoded)[self.peers.rank :: self.peers.world_size]
        rejects = RejectLog(None)
        shown, what = self.peers.is_main, f"reading {name.replace('_', ' ')}"
        with Bar(what, "utterance", shown=shown) as progress:
            good = find_readable(
                corpus.select(share), rejects, workers=self.recipe.data.workers, progress=progress
            )
        unreadable = sorted(self.peers.gather(share[~good].tolist()))
        return unreadable, self.peers.gather(list(rejects))

    def targets(self, corpus: Corpus) -> Labels:
        """What the next step of the training learns: read if it is there, else made.

        All processes work on it together; the seconds it took are in ``labels.json``.
        """
        steps_done = self.peers.of_main(self._steps_done)
        return self._labeller.labels(corpus, self.recipe.iteration_at(steps_done))

    def given_mixture(self, path: Path) -> GaussianMixture:
        """A mixture that was fitted before.

        Raises:
            InputError: it does not fit the recipe, or the run has another one.
        """
        return self._labeller.given_mixture(path)

    def take_mixture(self, given: GaussianMixture, corpus: Corpus) -> None:
        """Use it, instead of fitting one on `corpus`.

        Raises:
            InputError: it tells nothing of the audio.
        """
        self._labeller.take_mixture(given, corpus)

    def train(self, corpus: Corpus, *, profile: Path | None = None) -> TrainOutcome:
        """Train to the recipe's last step, or go on from the newest checkpoint.

        Every iteration first makes the labels that it needs. With `profile` a few steps are
        profiled into that folder.
        """
        done = self.peers.of_main(self._steps_done)
        outcome = TrainOutcome(steps_done=done, finished=True)
        left = [iteration for iteration in self.recipe.iterations if done < iteration.stop_step]
        if left:
            self.peers.say(*before_training(self.recipe.train, self.peers))
        for iteration in left:
            outcome = train(
                self.folder,
                self.recipe,
                corpus,
                self._labeller.labels(corpus, iteration),
                self.peers,
                iteration=iteration,
                rejects=self.rejects,
                profile=profile,
            )
            if not outcome.finished:
                break
        return outcome

    def evaluate(self, audio: Audio) -> Evaluation:
        """Measure the newest checkpoint on held-out audio and write numbers, plots and report.

        The labels are those that the checkpoint's last step learned. One process does it alone.

        Raises:
            InputError: there is no checkpoint.
        """
        recipe, device = self.recipe, self.peers.device
        trained = newest(self.folder, recipe)
        model = trained.model().to(device)
        last_step = max(trained.step - 1, 0)
        labeller = Labeller(self.folder, recipe, self.rejects, self.peers.alone())
        labels = labeller.labels(audio.train, recipe.iteration_at(last_step))
        targets = trained.targets(labels)
        with Stages() as progress:
            evaluation = evaluate(
                model,
                initial_model(recipe).eval().to(device),
                targets,
                recipe.front_end,
                audio.train,
                audio.heldout,
                max_train_s=recipe.evaluate.max_train_s,
                max_test_s=recipe.evaluate.max_test_s,
                mixture=labels.mixture_on_log_mel,
                head_input=recipe.objective.head_input,
                seed=recipe.seed,
                progress=progress,
            )
        evaluation.numbers["steps"] = trained.step
        write_report(self.folder.root, evaluation, read_metrics(self.folder.metrics))
        return evaluation

    def _steps_done(self) -> int:
        done = checkpoint.steps(self.folder.checkpoints)
        return done[-1][0] if done else 0


def _readable(corpus: Corpus, unreadable: list[int]) -> Corpus:
    good = np.ones(len(corpus), dtype=bool)
    good[unreadable] = False
    return corpus.select(good)


def _with_a_part_held_out(corpus: Corpus, recipe: Recipe) -> Audio:
    config = recipe.data
    kept, heldout = hold_out(
        corpus, fraction=config.heldout_fraction, by=config.heldout_by, seed=recipe.seed
    )
    return Audio(train=corpus.select(kept), heldout=corpus.select(heldout))


def n_heard(folder: RunFolder, corpus: Corpus) -> int | None:
    """Utterances of a corpus that a run trained on; None where it cannot be told, or no run is."""
    remembered = folder.root / "audio.json"
    if not remembered.exists():
        return None
    sources, recipe = folder.read()
    try:
        own = open_corpus(sources.audio, rejects=RejectLog(None))
    except InputError:  # it lies elsewhere now
        return None
    seen = read_json(remembered)
    if seen["fingerprint"] != own.fingerprint:
        return None
    own = _readable(own, seen["unreadable"])
    if not sources.heldout_audio:
        own = _with_a_part_held_out(own, recipe).train
    return n_in_both(own, corpus)


def open_run(
    root: Path,
    sources: Sources,
    recipe: Recipe,
    peers: Processes,
    *,
    audio_may_differ: bool = False,
) -> Run:
    """Begin a run in a folder, or go on with the one that is there.

    With `audio_may_differ` its audio may lie elsewhere now, or be other audio if nothing was made
    of it yet: `Run.audio` compares it.

    Raises:
        InputError: the folder holds something else.
    """
    folder = RunFolder(root)
    if peers.is_main:
        folder.open(sources, recipe, may_have_moved=audio_may_differ)
    peers.wait()
    return Run(folder, sources, recipe, peers, audio_may_differ=audio_may_differ)
