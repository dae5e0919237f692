"""Evaluation on held-out speech: clusters, mixture, embedding, and probes beside their controls."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate import plot_data
from gmm_jepa.evaluate.embed import (
    SAMPLE_RATE_HZ,
    Encoded,
    FrameTable,
    Utterance,
    encode,
    heard_frames,
    load_sample,
    log_mel_table,
    target_frames,
    with_context,
)
from gmm_jepa.evaluate.labels import Task, find_tasks, probe_data
from gmm_jepa.evaluate.probe import LinearProbe, majority, run_probe
from gmm_jepa.evaluate.tracks import describe, follow
from gmm_jepa.features import LogMelSpec
from gmm_jepa.files import finite, write_json, written_aside
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.objectives.meters import embedding_meters
from gmm_jepa.objectives.targets import Targets

if TYPE_CHECKING:
    from gmm_jepa.gmm import GaussianMixture

FORMAT = 1
CONTEXT_FRAMES = 3
TOP_CLUSTERS = 48

Progress = Callable[[str, int, int], None]
"""Called with the stage in words, what of it is done, and all of it."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    numbers: dict[str, Any]
    """Results, as plain JSON values; the keys are described in `evaluate`."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What the plots draw (see `plot_data`)."""

    def save(self, run_dir: str | Path) -> None:
        """Write ``evaluation.json`` and ``plots/data.npz``, each whole or not at all."""
        run_dir = Path(run_dir)
        with written_aside(run_dir / "plots" / "data.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, **self.arrays)
        write_json(run_dir / "evaluation.json", self.numbers)


def evaluate(
    model: JepaModel,
    untrained: JepaModel | None,
    targets: Targets | None,
    spec: LogMelSpec,
    train_corpus: Any,
    heldout_corpus: Any,
    *,
    mixture: GaussianMixture | None = None,
    head_input: str = "encoder",
    max_train_s: float = 600.0,
    max_test_s: float = 600.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a trained model. The online encoder is measured, without masks, in eval mode.

    Args:
        model: the trained networks, on any device.
        untrained: the same networks at random initialisation, as a control; None leaves it out.
        targets: what its cluster head learnt; None: it has none, and clusters are not measured.
        spec: the log-mel front end.
        train_corpus, heldout_corpus: `gmm_jepa.data.Corpus`; the first only trains the probes.
        mixture: the mixture on log-mel frames, if the targets are its components.
        head_input: "encoder" or "predictor": what the cluster head reads.
        max_train_s, max_test_s: seconds of audio that are drawn from them at most.
        seed: of every choice; one seed, one result on one machine.
        progress: see `Progress`.

    Returns:
        numbers: ``sample`` (what was drawn), ``clusters`` (``head`` and, for the targets of any
        kind, ``mixture``: entropy in [0, 1], used, effective, top_share, adjacent_consistency;
        agreement, kl, target_entropy, head_entropy), ``mixture`` (held-out log_likelihood per
        frame in nats, EM's curve),
        ``embedding`` (meters of z; ``untrained`` likewise), ``layer_weights``, ``probes`` (one per
        task, with rows), ``examples``, ``versions``, ``seconds``.

    Raises:
        InputError: no held-out utterance can be read.
    """
    began = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    heldout, bad_heldout = load_sample(heldout_corpus, max_s=max_test_s, seed=seed, heldout=True)
    if not heldout:
        raise InputError("heldout_corpus: expected at least one readable utterance, got none")
    train, bad_train = load_sample(train_corpus, max_s=max_train_s, seed=seed, heldout=False)
    tasks = find_tasks([*heldout, *train], seed=seed)
    sample = [*heldout, *train] if tasks else heldout  # held-out frames come first in every table

    encoded = encode(
        model.online, sample, progress=lambda done, total: report("encoding", done, total)
    )
    z = _first(encoded.output, len(heldout))
    if not len(z.values):
        raise InputError("heldout_corpus: every utterance is shorter than one frame")
    clusters = _Clusters(model, z, heldout, targets, mixture, spec, head_input)
    embedding = _embedding_numbers(z.values)
    arrays = clusters.arrays | plot_data.scatter(z, heldout, clusters.labels, name="trained")

    probes = [_Probe(task, sample, seed) for task in tasks]
    for name, table in _feature_sets(encoded, untrained, sample, spec, report):
        for done, probe in enumerate(probes, start=1):
            probe.add(name, table, device=next(model.parameters()).device)
            report(f"probing {name}", done, len(probes))
        if name == "untrained, output z":
            control = _first(table, len(heldout))
            embedding["untrained"] = _embedding_numbers(control.values)
            arrays |= plot_data.scatter(control, heldout, clusters.labels, name="untrained")

    numbers = {
        "format": FORMAT,
        "versions": _versions(),
        "sample": {
            **_describe(heldout, "heldout"),
            **_describe(train if tasks else [], "train"),
            "unreadable": bad_heldout + bad_train,
        },
        **clusters.numbers,
        "embedding": embedding,
        "layer_weights": encoded.layer_weights[: len(heldout)].mean(0).tolist(),
        "probes": [probe.result for probe in probes if probe.result["rows"]],
        "seconds": time.perf_counter() - began,
    }
    return Evaluation(finite(numbers), arrays)


class _Clusters:
    """Cluster head and targets on the held-out frames; empty for a model without a head."""

    def __init__(
        self,
        model: JepaModel,
        z: FrameTable,
        heldout: Sequence[Utterance],
        targets: Targets | None,
        mixture: GaussianMixture | None,
        spec: LogMelSpec,
        head_input: str,
    ) -> None:
        self.numbers: dict[str, Any] = {"examples": []}
        self.arrays: dict[str, NDArray[Any]] = {}
        self.labels: NDArray[np.int64] | None = None
        if targets is None:
            return
        device = next(model.parameters()).device
        n_frames, targets = np.diff(z.offsets), targets.to(device)
        anchors = log_mel_table(heldout, spec, n_frames, shift_samples=targets.shift_samples)
        frames = target_frames(heldout, targets.frames, n_frames, device)
        heard = heard_frames(model, z, head_input)
        tracks = follow(model, heard, frames, targets.clusters)
        self.labels = tracks.mixture
        self.arrays = plot_data.clusters(
            tracks, z.offsets, targets.clusters.centres, top=TOP_CLUSTERS
        )
        examples, example_arrays = plot_data.examples(heldout, z, anchors, tracks)
        self.arrays |= example_arrays
        self.numbers = {
            "clusters": describe(tracks, z.offsets, targets.clusters.n_clusters),
            "examples": examples,
        }
        if mixture is not None:
            self.numbers["mixture"] = _mixture_numbers(mixture, anchors.values)


def _feature_sets(
    encoded: Encoded,
    untrained: JepaModel | None,
    sample: Sequence[Utterance],
    spec: LogMelSpec,
    report: Progress,
) -> Iterator[tuple[str, FrameTable]]:
    """The rows of the probe table, one after the other so that few are in memory at once."""
    yield "trained, all layers", encoded.layers
    yield "trained, output z", encoded.output
    n_frames = np.diff(encoded.output.offsets)
    if untrained is not None:
        control = encode(
            untrained.online,
            sample,
            progress=lambda done, total: report("encoding, untrained", done, total),
        )
        yield "untrained, all layers", control.layers
        yield "untrained, output z", control.output
        del control
    frames = log_mel_table(sample, spec, n_frames)
    yield "log-mel", frames
    yield f"log-mel, {CONTEXT_FRAMES} frames each side", with_context(frames, CONTEXT_FRAMES)


class _Probe:
    """The table of one task, filled row by row."""

    def __init__(self, task: Task, sample: Sequence[Utterance], seed: int) -> None:
        self._task, self._sample, self._seed = task, sample, seed
        self.result: dict[str, Any] = {
            "task": task.name,
            "level": task.level,
            "split": task.split,
            "rows": [],
        }

    def add(self, name: str, table: FrameTable, *, device: torch.device) -> None:
        """Probe one set of features."""
        data = probe_data(self._task, self._sample, table)
        features = table.values if self._task.level == "frame" else table.pooled()
        row = run_probe(features, data, LinearProbe(seed=self._seed), device)
        if row is not None:
            self.result["n_classes"] = len(data.classes)
            self.result["majority"] = majority(data)
            self.result["n_test_utterances"] = len(np.unique(data.test_groups))
            self.result["rows"].append({"features": name, **row})


def _mixture_numbers(mixture: GaussianMixture, frames: Tensor) -> dict[str, Any]:
    curve = getattr(mixture, "lower_bounds_", None)
    likelihood = ops.gmm_log_likelihood(frames, mixture.mixture(device=frames.device))
    return {
        "log_likelihood": float(likelihood.double().mean()),
        "train_curve": [] if curve is None else np.asarray(curve, np.float64).tolist(),
        "n_iter": int(getattr(mixture, "n_iter_", 0) or 0),
        "one_pass": bool(getattr(mixture, "one_pass_", False)),
        "converged": bool(getattr(mixture, "converged_", False)),
        "n_reseeded": int(getattr(mixture, "n_reseeded_", 0) or 0),
    }


def _embedding_numbers(z: Tensor) -> dict[str, Any]:
    meters = {name: float(value) for name, value in embedding_meters(z).items()}
    return {"dimensions": z.shape[1], **meters}


def _describe(utterances: Sequence[Utterance], name: str) -> dict[str, Any]:
    samples = sum(len(u.waveform) for u in utterances)
    return {
        f"{name}_utterances": len(utterances),
        f"{name}_s": samples / SAMPLE_RATE_HZ,
        f"{name}_speakers": len({u.speaker for u in utterances} - {None}),
    }


def _first(table: FrameTable, n_utterances: int) -> FrameTable:
    """The table of the first utterances, a view."""
    offsets = table.offsets[: n_utterances + 1]
    return FrameTable(
        table.values[: offsets[-1]], offsets, table.hop_samples, table.first_centre_samples
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("gmm-jepa", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
