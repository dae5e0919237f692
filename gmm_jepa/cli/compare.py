"""`gmm-jepa compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gmm_jepa.cli import EXIT_STOPPED
from gmm_jepa.cli.parse import parse
from gmm_jepa.cli.table import format_table
from gmm_jepa.cli.training import RecipeOptions
from gmm_jepa.compare import page
from gmm_jepa.compare.jobs import StoppedError, run_all
from gmm_jepa.compare.plan import Planned, plan, prepare
from gmm_jepa.config import Recipe, System
from gmm_jepa.distributed import processes, refuse_torchrun
from gmm_jepa.errors import InputError
from gmm_jepa.files import read_json
from gmm_jepa.locks import held
from gmm_jepa.train.advice import on_precision


@dataclass(frozen=True, kw_only=True)
class CommonRecipe(Recipe):
    """A recipe whose system and seed are not asked for: a comparison has several of each."""

    system: tyro.conf.Suppress[System] = "gmm-anchored"
    seed: tyro.conf.Suppress[int] = 0


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RecipeOptions):
    """Several systems trained alike on the same audio, and one page on them.

    Every system and seed is an ordinary run in a folder of its own (OUT/SYSTEM/seed0). Settings
    given here hold for all systems, in the place of a system's own. Started again, it goes on where
    it stopped.
    """

    out: Path
    """Folder of the comparison."""
    systems: tuple[System, ...] = ("gmm-anchored", "pure-jepa", "wavlm-style")
    """What is compared."""
    seeds: tuple[int, ...] = (0,)
    """Every system is trained once with each."""
    jobs: int = 1
    """Trainings at a time, each in a process with its share of the cores."""
    recipe: Annotated[CommonRecipe, tyro.conf.arg(name="")]
    """Settings of all systems."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Entry point."""
    _refuse(arguments)
    options = parse(CompareOptions, command, arguments)
    if options.jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {options.jobs}")
    if len(set(options.systems)) != len(options.systems):
        raise InputError(f"systems: expected different ones, got {' '.join(options.systems)}")
    recipes = {name: _recipe(command, arguments, name) for name in options.systems}
    planned = plan(options.out, recipes, options.seeds)
    with held(options.out):
        with processes() as peers:
            peers.say(*on_precision(planned[0].recipe.train, peers.device))
            prepare(planned, options.sources(), peers)
        waiting = sum(not p.is_done for p in planned)
        print(f"{len(planned)} runs, {waiting} to train, {options.jobs} at a time: {options.out}")
        try:
            run_all(planned, jobs=options.jobs, on_done=_tell)
        except StoppedError as stopped:
            print(f"{stopped}; start again to go on")
            return EXIT_STOPPED
        written = page.write(options.out, planned, jobs=options.jobs)
    print(format_table(page.summary_rows(read_json(options.out / "compare.json"))))
    print(f"report: {written}")
    return 0


def _refuse(arguments: Sequence[str]) -> None:
    """What `run` understands and a comparison does not."""
    for word in arguments:
        name = word.partition("=")[0]
        if name in ("--system", "--seed"):
            raise InputError(f"{name}: a comparison takes {name}s, one or more")
    refuse_torchrun("compare starts its own processes")


def _recipe(command: str, arguments: Sequence[str], system: str) -> Recipe:
    """The settings of one system: its own, and over them what was given."""
    return Recipe(**vars(parse(CompareOptions, command, arguments, system=system).recipe))


def _tell(planned: Planned) -> None:
    print(f"done: {planned.folder.root}")
