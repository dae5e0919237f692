"""The processes of a run, as torchrun starts them; one process without it."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gmm_jepa.errors import InputError

Item = TypeVar("Item")
Tensors = TypeVar("Tensors", bound=tuple)

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""For how long processes wait for each other. They read their shares of the audio before they meet,
and shares differ; a process that is lost holds the others that long."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among its peers."""

    rank: int
    """Number of this process, from 0."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> dict[str, Any]:
        """What tells a stream of audio its part of the work."""
        return {"rank": self.rank, "world_size": self.world_size, "device": self.device}

    def alone(self) -> Processes:
        """This process for work that its peers take no part in."""
        return Processes(rank=0, world_size=1, device=self.device)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place and on any device; returns the tensor."""
        if self.world_size > 1:
            summed = tensor.to(self.device)
            dist.all_reduce(summed)
            tensor.copy_(summed)
        return tensor

    def add_each(self, tensors: Tensors) -> Tensors:
        """A named tuple of tensors, each summed as `add` does."""
        return type(tensors)(*map(self.add, tensors))

    def any(self, flag: bool) -> bool:
        """True everywhere if `flag` is true anywhere."""
        if self.world_size == 1:
            return flag
        return bool(self.add(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order; small and picklable ones."""
        if self.world_size == 1:
            return items
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def total(self, count: int) -> int:
        """Sum of a number that each process has."""
        return int(self.add(torch.tensor(count)))

    def of_main(self, make: Callable[[], Item]) -> Item:
        """What the main process, and no other, makes: small and picklable."""
        if self.world_size == 1:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, device=self.device)
        return cast(Item, box[0])

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def say(self, *lines: str) -> None:
        """Print lines, in the main process alone."""
        if self.is_main:
            for line in lines:
                print(line)


def refuse_torchrun(why: str) -> None:
    """For commands that torchrun would start in vain, several times.

    Raises:
        InputError: it announces several processes.
    """
    if _world_size() > 1:
        raise InputError(f"{why}: start it without torchrun")


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group that torchrun announces, nccl on CUDA and gloo on CPU, and leave it.

    To leave nccl's takes all processes. One that failed while others wait for it does not: it ends
    without, for torchrun to see it and end them.

    Raises:
        InputError: the environment names several processes, but not this one's rank.
    """
    world_size = _world_size()
    if world_size > 1 and "RANK" not in os.environ:
        raise InputError("RANK: expected beside WORLD_SIZE; start several processes with torchrun")
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size > 1:
        # What imports it later takes hold of the process group, which then outlives its end: a
        # thread of gloo's that drops a tensor while Python shuts down aborts the process.
        importlib.import_module("torch._dynamo")
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Processes(rank=rank, world_size=world_size, device=device)
    except BaseException:
        if world_size > 1 and backend == "nccl":
            atexit.register(_end_at_once)
        elif world_size > 1:
            _leave()
        raise
    if world_size > 1:
        _leave()


def _leave() -> None:
    gc.collect()  # what sharded models in cycles hold of the group
    dist.destroy_process_group()


def _end_at_once() -> None:
    """Not by way of destructors, of which nccl's wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _world_size() -> int:
    """Processes that torchrun announces; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
