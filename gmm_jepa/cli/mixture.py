"""`gmm-jepa fit-gmm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from gmm_jepa.cli.parse import PresetName, parse
from gmm_jepa.config import Recipe
from gmm_jepa.data.corpus import open_corpus
from gmm_jepa.data.rejects import Reject, RejectLog
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.files import refuse_existing
from gmm_jepa.fitting import FitSettings, fit_mixture
from gmm_jepa.gmm.partial import partial_of


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Fit a diagonal Gaussian mixture on the log-mel frames of a corpus, by EM.

    Audio is decoded and transformed while the frames before it are summed. A fit that was
    interrupted goes on by being started again; until it ends, its state is in OUT.partial.
    Of the recipe, `front-end`, `mixture`, `seed` and `data.max-bad-fraction` matter here.
    """

    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    out: Path
    """The mixture's file, for example gmm.safetensors."""
    preset: PresetName = "cpu"
    """Settings to start from; any of them can be overridden below."""
    rejects: Path | None = None
    """Where unusable audio is listed; default: OUT.rejects.jsonl. An earlier list is replaced."""
    fit: Annotated[FitSettings, tyro.conf.arg(name="")] = field(default_factory=FitSettings)
    """How it is fitted."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """All settings."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    options = parse(FitOptions, command, arguments)
    recipe = options.recipe
    refuse_existing(options.out)
    with processes() as peers:
        path = options.rejects or options.out.with_name(options.out.name + ".rejects.jsonl")
        partial = partial_of(options.out)
        is_new = not partial.exists()  # else the fit goes on, and so does its list
        rejects = RejectLog(path if peers.is_main else None, anew=is_new)
        corpus = open_corpus(options.audio, rejects=rejects)
        rejects.drop_earlier()
        if len(corpus) == 0:
            raise InputError(f"audio: nothing usable; {rejects.summary()}")
        n_found = len(corpus) + rejects.count
        rejects.check(n_found, recipe.data.max_bad_fraction)
        mixture = fit_mixture(
            corpus, recipe, rejects, peers, options.fit, partial=partial, on_report=print
        )
        rejects.extend(Reject(*fields) for fields in peers.gather(list(rejects)))
        rejects.check(n_found, recipe.data.max_bad_fraction)
        if peers.is_main:
            mixture.save(options.out, front_end=recipe.front_end)
            partial.unlink(missing_ok=True)
            print(f"{options.out}: K = {mixture.n_components}, D = {recipe.front_end.n_mels}")
            print(rejects.summary())
    return 0
