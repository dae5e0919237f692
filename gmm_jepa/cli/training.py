"""`gmm-jepa run`, `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gmm_jepa.cli import EXIT_STOPPED
from gmm_jepa.cli.parse import ModelName, PresetName, parse
from gmm_jepa.cli.table import format_table
from gmm_jepa.config import Recipe, Sources
from gmm_jepa.distributed import processes
from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.report import summary_rows
from gmm_jepa.pipeline import Audio, Run, open_run
from gmm_jepa.train.advice import on_precision
from gmm_jepa.train.folder import RunFolder, held


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Audio, and the settings to train with."""

    audio: tuple[str, ...]
    """Folders of audio, JSONL manifests, audio files or packed corpora."""
    out: Path
    """Folder of the run."""
    preset: PresetName = "cpu"
    """Settings to start from; any of them can be overridden below."""
    model: ModelName | None = None
    """Encoder to train; default: the preset's own."""
    weights: tuple[float, ...] = ()
    """How often an utterance of each source comes per epoch; default: once."""
    heldout_audio: tuple[str, ...] = ()
    """Sources to evaluate on; default: a part of the audio is held out."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """All settings; `system` sets what that system needs, which can be overridden as well."""

    def sources(self) -> Sources:
        """The audio of the run."""
        return Sources(
            audio=_absolute(self.audio),
            weights=self.weights,
            heldout_audio=_absolute(self.heldout_audio),
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions(RecipeOptions):
    """Audio in, pretrained encoder and report out. Started again, it goes on where it stopped."""

    profile: Path | None = None
    """Folder for a profile of a few early steps: a trace and a table of its operations."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Make the labels (or take a mixture) and train; no evaluation. Goes on where it stopped."""

    gmm: Path | None = None
    """A mixture fitted before; default: fit one on the audio."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure the newest checkpoint of a run on its held-out audio and write its report."""

    run: Path
    """Folder of the run."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point of the three commands."""
    if command == "evaluate":
        options = parse(EvaluateOptions, command, arguments)
        with processes() as peers:
            folder = RunFolder(options.run)
            run = Run(folder, *folder.read(), peers)
            _evaluate(run, run.audio())
        return 0
    options = parse(TrainOptions if command == "train" else RunOptions, command, arguments)
    sources = options.sources()
    with processes() as peers, held(options.out, peers):
        run = open_run(options.out, sources, options.recipe, peers, audio_may_differ=True)
        if not run.folder.has_results():
            peers.say(*on_precision(options.recipe.train, peers.device))
        path = options.gmm if isinstance(options, TrainOptions) else None
        given = None if path is None else run.given_mixture(path)  # before all audio is read
        audio = run.audio()
        if given is not None:
            run.take_mixture(given, audio.train)
        outcome = run.train(audio.train, profile=options.profile)
        if not outcome.finished:
            peers.say(f"stopped at step {outcome.steps_done}; start again to go on")
            return EXIT_STOPPED if peers.world_size == 1 else 0  # torchrun would start it again
        if command == "run":
            _evaluate(run, audio)
        else:
            peers.say(f"trained {outcome.steps_done} steps: {run.folder.checkpoints}")
        peers.say(run.rejects.summary())
    return 0


def _evaluate(run: Run, audio: Audio) -> None:
    if run.peers.is_main:
        evaluation = run.evaluate(audio)
        print(format_table(summary_rows(evaluation.numbers)))
        print(f"report: {run.folder.report}")


def _absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    if "" in paths:
        raise InputError("audio: an empty path")
    return tuple(str(Path(path).resolve()) for path in paths)
