"""Several commands in one set of processes, since starting processes takes longer than a command.

    torchrun ... tests/train/commands.py '[["train", ...], ["cut", FROM, TO, STEP], ...]'

``cut`` copies a run folder without the checkpoints after a step.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from gmm_jepa.cli import main

_init, _destroy = dist.init_process_group, dist.destroy_process_group


def cut(whole: Path, out: Path, step: int) -> None:
    """What a run that stopped after `step` would have left."""
    shutil.copytree(whole, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


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
        elif code := main([command, *words]):
            sys.exit(code)
    _destroy()
