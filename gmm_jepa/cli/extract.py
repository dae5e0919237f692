"""`gmm-jepa extract`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gmm_jepa.cli.parse import parse
from gmm_jepa.data.audio import SAMPLE_RATE_HZ, AudioError
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import OPTION, RejectLog, check_fraction
from gmm_jepa.distributed import processes, refuse_torchrun
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.extract import Extractor
from gmm_jepa.files import UNFINISHED, write_json, write_text, written_aside
from gmm_jepa.locks import held
from gmm_jepa.progress import track
from gmm_jepa.tensor_files import save_tensors
from gmm_jepa.train.trained import at_path

INDEX, REJECTS = "index.json", "rejects.jsonl"
MARK = "unfinished"
"""A file that lies beside the features until the index is written."""
_FEATURES = re.compile(r"\d{7,}_[A-Za-z0-9._-]*\.(npz|safetensors)(" + re.escape(UNFINISHED) + ")?")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Write the frame features of new audio, one file an utterance, and an index.json beside them.

    Each file holds `output` (frames, dimensions) float32, and `layer_<i>` and `clusters`
    (frames, K; posteriors of the cluster head) where asked for. 50 frames a second. What is longer
    than 30 s is encoded in windows that overlap, each with its own level, norms and means.
    """

    run: Path
    """Folder of a trained run (its newest checkpoint), or one of its checkpoints."""
    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    out: Path
    """Folder for the features; made if absent. What an unfinished start left is made again."""
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
    check_fraction(options.max_bad_fraction)
    refuse_torchrun("extract runs in one process")
    _refuse_other(options.out)
    trained = at_path(options.run)
    with processes() as peers:
        model = trained.model().to(peers.device)
    extract = Extractor(
        model,
        layers=options.layers,
        clusters=options.clusters,
        head_input=trained.recipe.objective.head_input,
    )
    with _begun(options.out):
        _extract(options, extract)
    return 0


def _extract(options: ExtractOptions, extract: Extractor) -> None:
    """Write the features, and the index last."""
    model = extract.model
    rejects = RejectLog(options.out / REJECTS, anew=True)
    corpus = open_corpus(options.audio, rejects=rejects)
    rejects.drop_earlier()
    n_found = len(corpus) + rejects.n_given

    def check_rejects() -> None:
        n_bad = rejects.n_given
        rejects.check(n_found, options.max_bad_fraction, n_bad=n_bad, option=OPTION)

    check_rejects()
    index: list[dict[str, object]] = []
    for i in track(range(len(corpus)), "extracting", "utterance"):
        entry = corpus.entry(i)
        try:
            waveform = corpus.read(i)
        except AudioError as error:
            rejects.add(corpus.reject(i, error))
            check_rejects()
            continue
        arrays = extract(waveform)
        name = f"{i:07d}_{_safe(str(entry['id']))}.{options.format}"
        _write(options.out / name, arrays)
        index.append({**entry, "features": name, "frames": len(arrays["output"])})
    if not index:
        raise InputError(f"audio: none of {len(corpus)} utterances could be read")
    write_json(
        options.out / INDEX,
        {
            "run": str(options.run),
            "frames_per_s": SAMPLE_RATE_HZ / model.online.hop_samples,
            "first_frame_centre_s": model.online.frame_centre_samples / SAMPLE_RATE_HZ,
            "utterances": index,
        },
    )
    print(f"{options.out}: features of {len(index)} utterances")
    print(rejects.summary())


def _refuse_other(out: Path) -> None:
    """Raise `InputError` where the folder holds features, or what no extraction left there."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if INDEX in names:
        raise InputError(f"{out} holds features already; give another folder")
    ours = {name for name in names if MARK in names and _FEATURES.fullmatch(name)}
    others = sorted(names - ours - {MARK, REJECTS, f"{INDEX}{UNFINISHED}", f"{MARK}{UNFINISHED}"})
    if others:
        raise InputError(
            f"{out} is not empty and holds no features ({others[0]}, ...): give another folder"
        )


@contextmanager
def _begun(out: Path) -> Iterator[None]:
    """Hold the folder, empty of features; unless all goes well, it is left so."""
    with held(out):
        _refuse_other(out)
        _clear(out)
        write_text(out / MARK, "")
        try:
            yield
        finally:
            _clear(out)


def _clear(out: Path) -> None:
    """Remove features that no index tells of, and last the sign of an unfinished start."""
    if not (out / INDEX).exists():
        for path in out.iterdir():
            if _FEATURES.fullmatch(path.name):
                path.unlink()
    (out / MARK).unlink(missing_ok=True)


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
