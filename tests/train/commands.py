"""Several commands in one set of processes, since starting processes takes longer than a command.

    torchrun ... tests/train/commands.py '[["train", ...], ["cut", FROM, TO, STEP], ...]'

``cut`` copies a run folder without the checkpoints after a step. ``start`` compares the weights
that a sharded run of a model starts from with those of one process.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gmm_jepa.calibration import synthetic_labels
from gmm_jepa.cli import main
from gmm_jepa.distributed import Processes
from gmm_jepa.objectives.build import initial_model
from gmm_jepa.presets import preset
from gmm_jepa.train.state import TrainState

_init, _destroy = dist.init_process_group, dist.destroy_process_group


def cut(whole: Path, out: Path, step: int) -> None:
    """What a run that stopped after `step` would have left."""
    shutil.copytree(whole, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def start(model: str) -> None:
    """Every process sees, bit for bit, the weights of `initial_model` in all parts together."""
    recipe = preset("smoke", model=model)
    expected = dict(initial_model(recipe).named_parameters())
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, shard=True))
    rank, size = dist.get_rank(), dist.get_world_size()
    peers = Processes(rank=rank, world_size=size, device=torch.device("cpu"))
    started = TrainState(recipe, synthetic_labels(recipe), peers).model
    assert list(expected) == [key for key, _ in started.named_parameters()]
    for key, p in started.named_parameters():
        assert p.requires_grad == expected[key].requires_grad, key
        assert torch.equal(p.full_tensor(), expected[key]), f"{key} in process {rank}"


def _join(*arguments: object, **options: object) -> None:
    """All commands share one process group: torchrun's store cannot make a second one."""
    if not dist.is_initialized():
        _init(*arguments, **options)


if __name__ == "__main__":
    dist.init_process_group, dist.destroy_process_group = _join, lambda: None
    for command, *words in json.loads(sys.argv[1]):
        if command == "cut":
            if dist.get_rank() == 0:
                cut(Path(words[0]), Path(words[1]), int(words[2]))
            dist.barrier()
        elif command == "start":
            start(*words)
        elif code := main([command, *words]):
            sys.exit(code)
    gc.collect()  # what sharded models in cycles hold of the group
    _destroy()
