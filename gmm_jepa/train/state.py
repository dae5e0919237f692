"""What training changes, and how it is brought to a step, updated and saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gmm_jepa.config import Recipe
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.objectives.gmm_anchored import GmmAnchored
from gmm_jepa.train import checkpoint
from gmm_jepa.train.distributed import Processes
from gmm_jepa.train.metrics import Meters


def initial_model(recipe: Recipe) -> JepaModel:
    """The model a run starts from; the same recipe gives the same weights."""
    torch.manual_seed(recipe.seed)
    return JepaModel(recipe.encoder, n_clusters=recipe.mixture.n_components)


class TrainState:
    """Model, optimiser and meters of one process.

    Args:
        recipe: all settings.
        mixture: the anchor.
        peers: this process among its peers.
    """

    def __init__(self, recipe: Recipe, mixture: GaussianMixture, peers: Processes) -> None:
        config = recipe.train
        self.step = 0
        self._peers = peers
        self.model = initial_model(recipe).to(peers.device)
        objective = GmmAnchored(
            self.model,
            mixture.mixture(device=peers.device),
            recipe.front_end,
            temperature=recipe.objective.temperature,
            target_shift_samples=recipe.target_shift_samples,
        )
        self.forward: nn.Module = objective
        if peers.world_size > 1:
            self.forward = DistributedDataParallel(objective, broadcast_buffers=False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.meters = Meters(peers, recipe.mixture.n_components)

    def resume(self, root: Path) -> None:
        """Go to the newest checkpoint under `root`, if there is one."""
        latest = checkpoint.newest(root)
        if latest is None:
            return
        checkpoint.load_weights(latest, self.model)
        state = checkpoint.load_state(latest)
        self.optimizer.load_state_dict(state["optimizer"])
        self.meters.load(state["meters"])
        self.step = state["step"]

    def save(self, root: Path, *, keep: int) -> None:
        """Write the checkpoint of the current step: called by all processes, done by one."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "meters": self.meters.state(),
        }
        if self._peers.is_main:
            checkpoint.save(root, self.step, self.model, state, keep=keep)
        self._peers.wait()

    def update(self, learning_rate: float, clip_norm: float) -> tuple[Tensor, Tensor]:
        """Clip, step and clear the gradients; one that is not finite skips the step on the device.

        Every process sees the same reduced gradients and so takes the same decision, and none
        waits for it.

        Returns:
            () gradient norm before clipping, and () 1.0 if the step was skipped, else 0.0.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, clip_norm, foreach=True)
        skipped = (~torch.isfinite(norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused optimisers leave out a step by this flag, as they do for torch.amp.GradScaler.
        self.optimizer.grad_scale = None
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm, skipped
