"""The labels of a run: mixtures or centroids, fitted on log-mel or on a layer of its own encoder.

Everything that was fitted stays in the run folder: ``gmm.safetensors`` or ``kmeans.safetensors``
(and ``gmm_2.safetensors``, ... of an ensemble) on log-mel, and for every later iteration i a folder
``labels_i`` with the clusters and the encoder whose layer they were fitted on. ``labels.json`` says
how many seconds each took.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.config import Iteration, Recipe
from gmm_jepa.data.base import Corpus
from gmm_jepa.data.frames import LogMelStream
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.data.windows import WindowStream
from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json, write_json, written_aside
from gmm_jepa.fitting import (
    PREFLIGHT_S,
    SEED_S,
    blank_mixture,
    common_sample,
    fit_mixture,
    refuse_degenerate,
    total_frames,
)
from gmm_jepa.gmm import ConvergenceWarning, GaussianMixture, KMeans
from gmm_jepa.gmm.partial import partial_of, seconds_in
from gmm_jepa.models import Encoder
from gmm_jepa.objectives.build import Labels, initial_model
from gmm_jepa.objectives.targets import layer_frames
from gmm_jepa.progress import Bar
from gmm_jepa.train import checkpoint
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.trained import at_step

Fitted = GaussianMixture | KMeans


class Labeller:
    """Makes the labels of a run, once.

    Args:
        folder: of the run.
        recipe: its settings.
        rejects: where unreadable audio is recorded.
        peers: this process among its peers; all of them call the methods together.
    """

    def __init__(
        self, folder: RunFolder, recipe: Recipe, rejects: RejectLog, peers: Processes
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.rejects = rejects
        self.peers = peers
        self._n_shared = 0

    def labels(self, corpus: Corpus, iteration: Iteration) -> Labels:
        """The labels of an iteration: read if they are there, else fitted.

        Raises:
            InputError: too few frames, frames that tell nothing of their cluster, or files of
                another run.
        """
        objective = self.recipe.objective
        if not objective.anchored:
            return Labels()
        self._n_shared = self.rejects.count  # until now all processes were told of all
        if iteration.number > 1:
            return self._of_layer(corpus, iteration)
        if objective.labels == "kmeans":
            made = self._made(self.folder.kmeans, lambda: self._centroids(corpus), kind=KMeans)
            return Labels((made,))
        n_mixtures = max(len(objective.ensemble), 1)
        return Labels(
            tuple(
                self._made(self.folder.mixture_of(i), lambda i=i: self._mixture(corpus, i))
                for i in range(n_mixtures)
            )
        )

    def given_mixture(self, path: Path) -> GaussianMixture:
        """A mixture that was fitted before.

        Raises:
            InputError: it does not fit the recipe, which may have no use for one, or the run has
                another one.
        """
        objective = self.recipe.objective
        if not objective.anchored or objective.labels == "kmeans":
            raise InputError("gmm: this system learns no mixture")
        given = self._load(path)
        if self.folder.mixture.exists():
            own = self._load(self.folder.mixture)
            if not np.array_equal(own.means_, given.means_):
                raise InputError(f"gmm: this run has a mixture already, other than {path}")
        return given

    def take_mixture(self, given: GaussianMixture, corpus: Corpus) -> None:
        """Use `given_mixture` instead of fitting one on `corpus`.

        Raises:
            InputError: it tells nothing of the audio.
        """
        self._n_shared = self.rejects.count
        if self.peers.of_main(lambda: not self.folder.mixture.exists()):
            sample = LogMelStream(
                corpus,
                self.recipe.front_end,
                rejects=self.rejects,
                max_s=PREFLIGHT_S,
                **self.peers.share,
            )
            refuse_degenerate(given, sample, self.peers)
            self._share_rejects()
            if self.peers.is_main:
                given.save(self.folder.mixture, front_end=self.recipe.front_end)
                partial_of(self.folder.mixture).unlink(missing_ok=True)
        self.peers.wait()

    def _made(
        self, path: Path, fit: Callable[[], Fitted], *, kind: type[Fitted] = GaussianMixture
    ) -> Fitted:
        """What is in a file of labels on log-mel frames; fitted first if there is none."""
        if self.peers.of_main(lambda: not path.exists()):
            with self._timed(path.name, before=seconds_in(partial_of(path))):
                fitted = fit()
            self._share_rejects()
            if self.peers.is_main:
                fitted.save(path, front_end=self.recipe.front_end)
                partial_of(path).unlink(missing_ok=True)
            self.peers.wait()
        return self._load(path, kind)

    def _load(
        self, path: Path, kind: type[Fitted] = GaussianMixture, *, on_log_mel: bool = True
    ) -> Fitted:
        """Read clusters that fit the recipe."""
        fitted = kind.load(path, front_end=self.recipe.front_end if on_log_mel else None)
        n_wanted = self.recipe.mixture.n_components
        n_found = len(fitted.cluster_centers_ if kind is not GaussianMixture else fitted.means_)
        if n_found != n_wanted:
            raise InputError(
                f"{path}: a mixture of {n_found} components, but the recipe says {n_wanted}"
            )
        return fitted

    def _mixture(self, corpus: Corpus, number: int) -> GaussianMixture:
        """The mixture `number` (from 0) of an ensemble.

        The first is fitted as any other; EM goes on from it to each of the others, on half of the
        audio drawn anew. So component k means the same in all of them.
        """
        recipe, peers = self.recipe, self.peers
        if number == 0:
            return fit_mixture(
                corpus, recipe, self.rejects, peers, partial=partial_of(self.folder.mixture)
            )
        first = self._load(self.folder.mixture)
        other = blank_mixture(self.recipe)
        other.weights_init, other.means_init = first.weights_, first.means_
        other.precisions_init = first.precisions_
        frames = LogMelStream(
            corpus,
            recipe.front_end,
            rejects=self.rejects,
            max_s=min(recipe.mixture.max_fit_s, corpus.total_s / 2),
            seed=recipe.seed + number,
            **peers.share,
        )
        return self._fit(other, frames)

    def _centroids(self, corpus: Corpus) -> KMeans:
        """k-means on log-mel frames."""
        recipe = self.recipe
        frames = LogMelStream(
            corpus,
            recipe.front_end,
            rejects=self.rejects,
            max_s=recipe.mixture.max_fit_s,
            seed=recipe.seed,
            **self.peers.share,
        )
        return self._fit(self._kmeans(), frames, common_sample(frames, self.peers))

    def _of_layer(self, corpus: Corpus, iteration: Iteration) -> Labels:
        """Clusters of a layer of the encoder that the iteration before has trained."""
        layer = self.recipe.objective.relabel_layer
        folder = self.folder.labels(iteration.number)
        kmeans = self.recipe.objective.labels == "kmeans"
        kind = KMeans if kmeans else GaussianMixture
        name = (self.folder.kmeans if kmeans else self.folder.mixture).name
        if self.peers.of_main(lambda: not folder.exists()):
            trained = at_step(self.folder, self.recipe, iteration.first_step)
            encoder = trained.model().online.to(self.peers.device)
            with self._timed(f"{folder.name}/{name}"):
                frames, start = (
                    self._layer_stream(corpus, encoder, whole=w) for w in (True, False)
                )
                estimator = self._kmeans() if kmeans else blank_mixture(self.recipe)
                fitted = self._fit(estimator, frames, _all_frames(start))
            self._share_rejects()
            if self.peers.is_main:
                with written_aside(folder) as aside:
                    aside.mkdir()
                    fitted.save(aside / name)
                    checkpoint.save_weights(aside, encoder.state_dict())
            self.peers.wait()
        encoder = initial_model(self.recipe).online
        checkpoint.load_weights(folder, encoder)
        fitted = self._load(folder / name, kind, on_log_mel=False)
        return Labels((fitted,), encoder=encoder, layer=layer)

    def _layer_stream(self, corpus: Corpus, encoder: Encoder, *, whole: bool) -> LayerStream:
        peers = self.peers if whole else self.peers.alone()
        return LayerStream(
            encoder,
            self.recipe.objective.relabel_layer,
            corpus,
            rejects=self.rejects,
            max_s=self.recipe.mixture.max_fit_s if whole else SEED_S,
            seed=self.recipe.seed,
            **peers.share,
        )

    def _kmeans(self) -> KMeans:
        config = self.recipe.mixture
        return KMeans(
            n_clusters=config.n_components, max_iter=config.max_iter, random_state=self.recipe.seed
        )

    def _fit(
        self, estimator: Fitted, frames: WindowStream, start_frames: Tensor | None = None
    ) -> Fitted:
        """Fit on the frames of all processes, every one from the same start frames."""
        config, peers = self.recipe.mixture, self.peers
        total_frames(frames, self.recipe, peers)
        with (
            Bar("clustering the frames", "iteration", shown=peers.is_main) as bar,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ConvergenceWarning)
            return estimator.fit(
                frames,
                on_iteration=lambda done, _: bar(done, config.max_iter),
                all_reduce=peers.add_each,
                start_frames=start_frames,
            )

    def _share_rejects(self) -> None:
        """Tell all processes, of which the main one writes it down, what each could not read."""
        own = list(self.rejects)[self._n_shared :]
        self.rejects.extend(Reject(*fields) for fields in self.peers.gather(own))
        self._n_shared = self.rejects.count

    @contextmanager
    def _timed(self, name: str, *, before: float = 0.0) -> Iterator[None]:
        """Note the seconds that making `name` took, with those before a stop."""
        began = time.perf_counter() - before
        yield
        if self.peers.is_main:
            seconds = label_seconds(self.folder) | {name: time.perf_counter() - began}
            write_json(self.folder.label_times, seconds)


class LayerStream(WindowStream):
    """Standardised frames of a layer of an encoder.

    Args:
        encoder: in eval mode, on the device of the stream.
        layer: 0 the front end, i the output of block i.
        corpus, options: see `WindowStream`.
    """

    def __init__(self, encoder: Encoder, layer: int, corpus: Corpus, **options: Any) -> None:
        self.encoder, self.layer = encoder.eval(), layer
        size = {"hop_samples": encoder.hop_samples, "width": encoder.config.code_dim}
        super().__init__(corpus, **size, **options)

    @torch.no_grad()
    def frames(self, waveform: Tensor) -> Tensor:
        """(S,) -> (n, width)."""
        return layer_frames(self.encoder(waveform[None]), self.layer)[0]

    def frame_counts(self, n_samples: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
        """All that the encoder makes."""
        return self.encoder.n_frames(torch.as_tensor(n_samples)).numpy()


def _all_frames(stream: WindowStream) -> Tensor:
    batches = [batch.cpu() for batch in stream]
    if not batches:
        raise InputError("audio: none of it can be read")
    return torch.cat(batches)


def label_seconds(folder: RunFolder) -> dict[str, float]:
    """Seconds that making each file of labels took."""
    return read_json(folder.label_times) if folder.label_times.exists() else {}
