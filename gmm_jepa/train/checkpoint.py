"""Checkpoints: one folder a step, complete or absent, read without unpickling."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gmm_jepa.errors import InputError, require
from gmm_jepa.files import UNFINISHED, written_aside
from gmm_jepa.tensor_files import read_state, save_state, save_tensors

WEIGHTS = "model.safetensors"
STATE = "state.pt"
_ADVICE = "remove this step's folder to go on from the checkpoint before"


def save(
    root: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of `step` (steps done) and remove all but the newest `keep`.

    Args:
        root: the folder of all checkpoints.
        step: optimiser steps done.
        weights: of the model, whole; they become ``model.safetensors``.
        state: what else resuming needs: nested dicts and lists of tensors and numbers.
        keep: number of checkpoints that stay, this one included.
    """
    folder = root / f"step_{step:08d}"
    for unfinished in root.glob(f"step_*{UNFINISHED}"):  # of a save that was killed
        shutil.rmtree(unfinished)
    with written_aside(folder) as aside:
        aside.mkdir()
        save_weights(aside, weights)
        save_state(aside / STATE, state)
    for _, old in steps(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def steps(root: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints under `root`, oldest first."""
    found = []
    for folder in root.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def newest(root: Path, *, after: int = 0) -> Path | None:
    """The checkpoint of the latest step, if there is one later than `after`."""
    found = [folder for step, folder in steps(root) if step > after]
    return found[-1] if found else None


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write ``model.safetensors`` into a folder that is written aside."""
    save_tensors(folder / WEIGHTS, weights)


def load_weights(
    folder: Path, model: nn.Module, *, split: Callable[..., dict[str, Tensor]] | None = None
) -> None:
    """Load ``model.safetensors`` into `model`; every tensor must fit.

    Args:
        folder: of the checkpoint.
        model: changed in place.
        split: takes whole weights and a sharded `model`, gives the parts that belong here.

    Raises:
        InputError: the file is absent, damaged, or of another model.
    """
    safetensors = require("safetensors.torch", extra="train")
    path = folder / WEIGHTS
    try:
        weights = safetensors.load_file(str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise InputError(f"{path}: damaged ({error}); {_ADVICE}") from None
    try:
        model.load_state_dict(weights if split is None else split(weights, model))
    except RuntimeError as error:
        last_line = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: weights of another model ({last_line})") from None


def load_state(folder: Path) -> dict[str, Any]:
    """Load what `save` was given as `state`, without unpickling code.

    Raises:
        InputError: the file is absent or damaged.
    """
    return read_state(folder / STATE, f"damaged; {_ADVICE}")
