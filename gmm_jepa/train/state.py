"""What training changes, and how it is brought to a step, updated and saved."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gmm_jepa.config import Recipe, TrainConfig
from gmm_jepa.distributed import Processes
from gmm_jepa.objectives.build import Labels, build_objective, initial_model
from gmm_jepa.objectives.schedules import Schedule
from gmm_jepa.ops.lists import total_norm
from gmm_jepa.train import checkpoint
from gmm_jepa.train.compile import compile_networks
from gmm_jepa.train.copies import Copies
from gmm_jepa.train.meters import Meters
from gmm_jepa.train.sharding import Shards


class TrainState:
    """Model, objective, optimiser and meters of one process.

    Args:
        recipe: all settings.
        labels: what was fitted before.
        peers: this process among its peers.
        first_step: of the iteration; a training begins there with a new model.
    """

    def __init__(
        self, recipe: Recipe, labels: Labels, peers: Processes, *, first_step: int = 0
    ) -> None:
        config = recipe.train
        self.step = self._first_step = first_step
        self._peers = peers
        sharded = config.shard and peers.world_size > 1
        # Sharded, the main process alone makes the values, and sends them a unit at a time.
        valueless = sharded and not peers.is_main
        with torch.device("meta") if valueless else contextlib.nullcontext():
            self.model = initial_model(recipe)
        if not sharded:
            self.model.to(peers.device)
        self.model.online.recomputes_blocks = config.checkpoint_blocks
        if config.compile:
            compile_networks(
                self.model,
                n_buckets=recipe.data.n_buckets,
                report=print if peers.is_main else lambda _line: None,
                by_block=sharded,
                cuda_graphs=config.cuda_graphs,
            )
        self.objective = build_objective(recipe, self.model, labels)
        self.forward: nn.Module = self.objective
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._shards: Shards | None = None
        if sharded:
            self._shards = Shards(self.objective, config, peers)
            self.parameters = self._shards.parameters
        elif peers.world_size > 1:
            self.forward = _shared(self.objective, config)
        # From its third backward pass on DDP sends gradients in other parts, which adds them up in
        # another order: a resumed training would make other first steps than one that went on.
        self.n_rehearsals = 0 if self.forward is self.objective else 2
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.copied = Copies(peers.device)
        self.meters = Meters(peers, self.objective.parts, self.objective.n_clusters)

    def resume(self, root: Path) -> None:
        """Go to the newest checkpoint under `root`, if there is one of this iteration."""
        latest = self._peers.of_main(lambda: checkpoint.newest(root, after=self._first_step))
        if latest is None:
            return
        shards = self._shards
        checkpoint.load_weights(latest, self.model, split=shards and shards.split_weights)
        state = checkpoint.load_state(latest)
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(shards.split_moments(optimizer) if shards else optimizer)
        self.objective.load_state(state["objective"])
        self.meters.load(state["meters"])
        self.step = state["step"]

    def save(self, root: Path, *, keep: int) -> None:
        """Write the checkpoint of the current step: called by all processes, done by one."""
        weights, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if self._shards is not None:
            weights = self._shards.gather_weights(weights)
            optimizer = self._shards.gather_moments(optimizer)
        state = {
            "step": self.step,
            "optimizer": optimizer,
            "objective": self.objective.state(),
            "meters": self.meters.state(),
        }
        if self._peers.is_main:
            checkpoint.save(root, self.step, weights, state, keep=keep)
        self._peers.wait()

    def forget_rehearsal(self) -> None:
        """Drop the gradients of a backward pass before the first step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.n_rehearsals -= 1

    def update(self, schedule: Schedule, clip_norm: float) -> tuple[Tensor, Tensor]:
        """Clip, step, clear the gradients and move what follows by averages.

        A gradient that is not finite skips the step on the device.

        Every process sees the same norm of the reduced gradients and so takes the same decision,
        and none waits for it.

        Returns:
            () gradient norm before clipping, and () 1.0 if the step was skipped, else 0.0.
        """
        norm = self._gradient_norm()
        skipped = (~torch.isfinite(norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate
        # The fused optimisers divide gradients, and leave out a step, as for torch.amp.GradScaler:
        # to clip is no pass of its own.
        self.optimizer.grad_scale = ((norm.float() + 1e-6) / clip_norm).clamp(min=1.0)
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(schedule, self._peers)
        self.step += 1
        return norm, skipped

    def _gradient_norm(self) -> Tensor:
        """() norm of the gradient over all parameters, and processes where they are sharded."""
        if self._shards is not None:
            self._shards.take_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        return norm if self._shards is None else self._peers.add(norm.square()).sqrt()


def _shared(objective: nn.Module, config: TrainConfig) -> DistributedDataParallel:
    """The objective with gradients that are averaged over the processes.

    They lie in the buckets that are sent, so that none is copied. The same parameters take part in
    every step, which DDP may rely on (`static_graph`); in a step of several micro-batches it
    cannot, since it looks for gradients in the first backward pass, which sends none.
    """
    shared = DistributedDataParallel(
        objective,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=config.accumulate == 1,
    )
    if config.reduce_precision == "bf16":
        shared.register_comm_hook(None, bf16_compress_hook)
    return shared
