"""`gmm-jepa extract`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gmm_jepa.cli.parse import parse
from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.distributed import processes, refuse_torchrun
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.extract import Extractor
from gmm_jepa.files import write_json, written_aside
from gmm_jepa.progress import track
from gmm_jepa.tensor_files import save_tensors
from gmm_jepa.train.folder import RunFolder
from gmm_jepa.train.trained import newest


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Write the frame features of new audio, one file an utterance, and an index.json beside them.

    Each file holds `output` (frames, dimensions) float32, and `layer_<i>` and `clusters`
    (frames, K; posteriors of the cluster head) where asked for. 50 frames a second. What is longer
    than 30 s is encoded in windows that overlap, each with its own level, norms and means.
    """

    run: Path
    """Folder of a trained run."""
    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    out: Path
    """Folder for the features; made if absent."""
    layers: tuple[int, ...] = ()
    """Hidden layers to add: 0 is the projected front end, i the output of block i."""
    clusters: bool = False
    """Add the cluster posteriors."""
    format: Literal["npz", "safetensors"] = "npz"
    """Kind of file."""
    max_bad_fraction: float = 0.01
    """Share of unusable inputs that is put up with."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(ExtractOptions, command, arguments)
    refuse_torchrun("extract runs in one process")
    if (options.out / "index.json").exists():
        raise InputError(f"{options.out} holds features already; give another folder")
    folder = RunFolder(options.run)
    _, recipe = folder.read()
    with processes() as peers:
        model = newest(folder, recipe).model().to(peers.device)
    extract = Extractor(
        model,
        layers=options.layers,
        clusters=options.clusters,
        head_input=recipe.objective.head_input,
    )
    rejects = RejectLog(options.out / "rejects.jsonl")
    corpus = open_corpus(options.audio, rejects=rejects)
    n_found = len(corpus) + rejects.count
    rejects.check(n_found, options.max_bad_fraction)
    index: list[dict[str, object]] = []
    for i in track(range(len(corpus)), "extracting", "utterance"):
        entry = corpus.entry(i)
        try:
            waveform = corpus.read(i)
        except AudioError as error:
            rejects.add(corpus.reject(i, error))
            rejects.check(n_found, options.max_bad_fraction)
            continue
        arrays = extract(waveform)
        name = f"{i:07d}_{_safe(str(entry['id']))}.{options.format}"
        _write(options.out / name, arrays)
        index.append({**entry, "features": name, "frames": len(arrays["output"])})
    if not index:
        raise InputError(f"audio: none of {len(corpus)} utterances could be read")
    write_json(
        options.out / "index.json",
        {
            "run": str(options.run),
            "frames_per_s": SAMPLE_RATE_HZ / model.online.hop_samples,
            "first_frame_centre_s": model.online.frame_centre_samples / SAMPLE_RATE_HZ,
            "utterances": index,
        },
    )
    print(f"{options.out}: features of {len(index)} utterances")
    print(rejects.summary())
    return 0


def _safe(name: str) -> str:
    """A file name made of letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-100:]


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with written_aside(path) as aside:
        if path.suffix == ".npz":
            with aside.open("wb") as file:
                np.savez(file, **arrays)
        else:
            save_tensors(aside, {name: torch.from_numpy(array) for name, array in arrays.items()})
