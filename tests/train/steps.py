"""Steps of a training on audio made here, outside a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gmm_jepa.calibration import SyntheticCorpus, synthetic_labels
from gmm_jepa.config import Recipe
from gmm_jepa.data.loader import make_loader
from gmm_jepa.distributed import Processes
from gmm_jepa.objectives.prepare import MaskAndDisturb
from gmm_jepa.train.state import TrainState
from gmm_jepa.train.trainer import batch_plan, training_step


def steps_of(
    recipe: Recipe, *, peers: Processes, pinned: bool = False
) -> tuple[Callable[[int], object], TrainState]:
    """A function that makes a step of one of four batches, and what it changes."""
    state = TrainState(recipe, synthetic_labels(recipe), peers)
    state.model.train()
    corpus = SyntheticCorpus(16, 1.0)
    batches = make_loader(
        corpus,
        batch_plan(corpus, recipe),
        stop_step=20,
        rank=peers.rank,
        world_size=peers.world_size,
        pin_memory=pinned,
        prepare=MaskAndDisturb(recipe.objective, recipe.encoder.n_frames, seed=0),
    )
    made = [next(batches) for _ in range(4)]
    return (lambda i: training_step(state, made[i], recipe, peers)), state


def alone(device: torch.device) -> Processes:
    return Processes(rank=0, world_size=1, device=device)
