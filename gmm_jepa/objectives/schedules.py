"""Values that change over a run, as pure functions of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

from gmm_jepa.config import Recipe


class Schedule(NamedTuple):
    """The values that change over a training, at one step."""

    anchor_weight: float
    """lambda."""
    learning_rate: float
    teacher_decay: float
    step: int
    """Counted from 0 in this iteration."""
    n_steps: int
    """Of this iteration."""

    def metrics(self) -> dict[str, float]:
        """Under their names in the metrics."""
        return {
            "lambda": self.anchor_weight,
            "learning_rate": self.learning_rate,
            "teacher_decay": self.teacher_decay,
        }


def schedule_at(recipe: Recipe, step: int) -> Schedule:
    """The schedules at `step` of the run, counted from 0; every iteration has them anew."""
    config, objective = recipe.train, recipe.objective
    iteration = recipe.iteration_at(step)
    own_step, n_steps = step - iteration.first_step, iteration.n_steps
    done = progress(own_step, n_steps)
    return Schedule(
        interpolate(objective.anchor_start, objective.anchor_end, done, objective.anchor_schedule),
        learning_rate(
            own_step,
            n_steps,
            peak=config.learning_rate,
            warmup_share=config.warmup_share,
            shape=config.learning_rate_schedule,
        ),
        interpolate(config.teacher_decay_start, config.teacher_decay, done, "linear"),
        own_step,
        n_steps,
    )


def interpolate(start: float, end: float, progress: float, shape: str) -> float:
    """A value on its way from `start` to `end`.

    Args:
        start: value at progress 0.
        end: value at progress 1.
        progress: share of the run that is done, clamped to [0, 1].
        shape: "linear", "cosine" (half a cosine), "exponential" (a straight line in the
            logarithm; both ends above 0) or "constant" (stays at `start`).
    """
    t = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "linear":
        return start + (end - start) * t
    if shape == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * t))
    if shape == "exponential":
        return start * (end / start) ** t
    raise ValueError(f"shape: expected linear, cosine, exponential or constant, got {shape!r}")


def progress(step: int, steps: int) -> float:
    """Share of the run done at `step`, counted from 0; the last step has 1."""
    return step / max(steps - 1, 1)


def learning_rate(step: int, steps: int, *, peak: float, warmup_share: float, shape: str) -> float:
    """Learning rate at `step`: a linear rise to `peak`, then constant or a cosine to peak / 100."""
    n_warmup = round(warmup_share * steps)
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    return interpolate(peak, peak / 100, progress(step - n_warmup, steps - n_warmup), shape)
