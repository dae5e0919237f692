"""Lines for whoever started a training: settings that do nothing, or slow it down."""

from __future__ import annotations

import math
import os

import torch

from gmm_jepa.config import DataConfig, TrainConfig
from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.distributed import Processes
from gmm_jepa.ops.native import multiplies_bfloat16
from gmm_jepa.train.precision import bf16_slowdown

WAITS_TOO_LONG = 0.05
"""Share of the time spent waiting for audio from which more workers pay."""
MUCH_PADDING = 0.05
"""Share of the work that is lost to empty rows from which it is worth a line."""


def on_precision(config: TrainConfig, device: torch.device) -> list[str]:
    """Whether the other precision may be faster on this CPU; a run keeps the one it begins with."""
    if device.type != "cpu":
        return []
    if config.precision == "fp32":
        faster = "fp32: this CPU multiplies bfloat16; --train.precision bf16 can be faster"
        return [faster] if multiplies_bfloat16() else []
    slowdown = bf16_slowdown()
    if slowdown is None:
        return []
    return [
        f"bf16: this CPU multiplies it {slowdown:.0f} times slower than float32; "
        "--train.precision fp32 is faster"
    ]


def before_training(config: TrainConfig, peers: Processes) -> list[str]:
    """What can be said before the first step; for the main process to print."""
    lines = []
    if config.shard and peers.world_size == 1:
        lines.append("train.shard: one process, so nothing is sharded; torchrun starts several")
    if peers.device.type != "cpu":
        return lines
    return lines + _threads(torch.get_num_threads(), peers)


def on_batches(plan: BatchPlan, world_size: int) -> list[str]:
    """What is left out of the batches, and what so many processes compute in vain."""
    lines = []
    if plan.n_too_short:
        lines.append(f"{plan.n_too_short} utterances left out: shorter than data.min_segment_s")
    padding, alone = plan.padding(world_size), plan.padding()
    if padding > alone + MUCH_PADDING:
        lines.append(
            f"data.batch_s: {padding:.0%} of what {world_size} processes compute is padding, "
            f"{alone:.0%} of what one does; larger batches share out better"
        )
    return lines


def on_waiting(wait_share: float, config: DataConfig, cores: int) -> str | None:
    """What to do about the time spent waiting for audio, as measured over a line of metrics.

    A step that computes for c seconds and gets a batch every f / w seconds from w workers waits for
    1 - c w / f of its time, and for none with f / c workers.

    Args:
        wait_share: of the time.
        config: as it is.
        cores: that this process may use for workers.
    """
    if wait_share < WAITS_TOO_LONG:
        return None
    busy = 1.0 - min(wait_share, 0.999)
    enough = config.workers / busy if config.workers else wait_share / busy
    wanted = min(math.ceil(enough - 1e-6), cores)  # not one more for rounding
    what = f"--data.workers {wanted} would help"
    if wanted <= config.workers:
        what = "there are no cores for more workers; a packed corpus is read fastest"
    return f"data: {wait_share:.0%} of the time went into waiting for audio; {what}"


def share_of_cores(peers: Processes) -> int:
    """Processors for each process of this run on this machine."""
    return max(1, usable_cores() // _local_processes(peers))


def usable_cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(threads: int, peers: Processes) -> list[str]:
    share, processes = share_of_cores(peers), _local_processes(peers)
    if processes == 1 or threads == share:
        return []
    return [
        f"OMP_NUM_THREADS: {processes} processes use {threads} threads each, on "
        f"{usable_cores()} cores; "
        f"OMP_NUM_THREADS={share} suits them better"
    ]


def _local_processes(peers: Processes) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", peers.world_size))
