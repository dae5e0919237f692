"""`gmm-jepa fit-gmm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gmm_jepa.cli.parse import PresetName, parse
from gmm_jepa.config import Recipe
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import RejectLog
from gmm_jepa.errors import InputError
from gmm_jepa.fitting import fit_mixture
from gmm_jepa.train.distributed import processes


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Fit a diagonal Gaussian mixture on the log-mel frames of a corpus, by EM.

    Of the recipe, `front-end`, `mixture`, `seed` and `data.max-bad-fraction` matter here.
    """

    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    out: Path
    """The mixture's file, for example gmm.safetensors."""
    preset: PresetName = "cpu"
    """Settings to start from; any of them can be overridden below."""
    rejects: Path | None = None
    """Where unusable audio is listed; default: beside the mixture."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """All settings."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(FitOptions, command, arguments)
    recipe = options.recipe
    if options.out.exists():
        raise InputError(f"{options.out} exists already; it is left as it is")
    rejects = RejectLog(options.rejects or options.out.with_name("rejects.jsonl"))
    corpus = open_corpus(options.audio, rejects=rejects)
    if len(corpus) == 0:
        raise InputError(f"audio: nothing usable; {rejects.summary()}")
    n_found = len(corpus) + rejects.count
    rejects.check(n_found, recipe.data.max_bad_fraction)
    with processes() as peers:
        mixture = fit_mixture(corpus, recipe, rejects, peers)
        if peers.is_main:
            mixture.save(options.out, front_end=recipe.front_end)
            print(f"{options.out}: K = {mixture.n_components}, D = {recipe.front_end.n_mels}")
            print(rejects.summary())
    rejects.check(n_found, recipe.data.max_bad_fraction)
    return 0
