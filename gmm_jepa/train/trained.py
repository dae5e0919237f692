"""What a run has trained so far, as one of its checkpoints holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gmm_jepa.config import Recipe
from gmm_jepa.errors import InputError
from gmm_jepa.models import JepaModel
from gmm_jepa.objectives.build import Labels, build_objective, initial_model
from gmm_jepa.objectives.targets import Targets
from gmm_jepa.train import checkpoint
from gmm_jepa.train.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One checkpoint of a run. All that is asked of it is of the same step."""

    folder: RunFolder
    """Of the run."""
    recipe: Recipe
    """Of the run."""
    step: int
    """Steps done."""
    path: Path
    """Of the checkpoint."""

    def model(self) -> JepaModel:
        """In eval mode, on the CPU.

        Raises:
            InputError: the checkpoint is damaged.
        """
        model = initial_model(self.recipe)
        checkpoint.load_weights(self.path, model)
        return model.eval()

    def targets(self, labels: Labels) -> Targets | None:
        """What the last step learned, of the labels it had; None for a run without clusters.

        Raises:
            InputError: the checkpoint is damaged.
        """
        objective = build_objective(self.recipe, self.model(), labels)
        objective.load_state(checkpoint.load_state(self.path)["objective"])
        return objective.targets()


def newest(folder: RunFolder, recipe: Recipe) -> Trained:
    """The newest checkpoint of a run.

    Raises:
        InputError: there is none.
    """
    done = checkpoint.steps(folder.checkpoints)
    if not done:
        raise InputError(f"{folder.root}: no checkpoint yet; train first")
    step, path = done[-1]
    return Trained(folder=folder, recipe=recipe, step=step, path=path)


def at_path(path: Path) -> Trained:
    """The newest checkpoint of a run folder, or the one that lies at the path.

    Raises:
        InputError: there is none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    folder = RunFolder(path)
    if folder.config.exists() or not (path / checkpoint.WEIGHTS).exists():
        return newest(folder, folder.read()[1])
    path = path.resolve()
    folder = RunFolder(path.parent.parent)
    for step, found in checkpoint.steps(folder.checkpoints):
        if found == path:
            return Trained(folder=folder, recipe=folder.read()[1], step=step, path=path)
    raise InputError(f"{path}: expected a run folder or one of its checkpoints")


def at_step(folder: RunFolder, recipe: Recipe, step: int) -> Trained:
    """The checkpoint of a run after `step` steps.

    Raises:
        InputError: there is none.
    """
    done = dict(checkpoint.steps(folder.checkpoints))
    if step not in done:
        raise InputError(f"{folder.root}: no checkpoint of step {step}; start a new run")
    return Trained(folder=folder, recipe=recipe, step=step, path=done[step])
