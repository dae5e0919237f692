"""Lines are said where they help, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gmm_jepa.config import DataConfig, TrainConfig
from gmm_jepa.data.batches import BatchPlan
from gmm_jepa.distributed import Processes
from gmm_jepa.train import advice


@pytest.mark.parametrize(
    ("share", "workers", "cores", "said"),
    [
        (0.01, 2, 16, None),
        (0.5, 2, 16, "--data.workers 4"),
        (0.75, 2, 16, "--data.workers 8"),
        (0.75, 2, 4, "--data.workers 4"),
        (0.5, 4, 4, "no cores for more workers"),
        (0.5, 0, 16, "--data.workers 1"),
        (0.8, 0, 16, "--data.workers 4"),
        (1.0, 1, 2, "--data.workers 2"),
    ],
)
def test_waiting_for_audio(share, workers, cores, said):
    line = advice.on_waiting(share, DataConfig(workers=workers), cores)
    assert line is None if said is None else said in line


def test_batches_that_do_not_share_out():
    lengths = np.random.default_rng(0).integers(2 * 16_000, 15 * 16_000, 3_000)
    plan = BatchPlan(lengths, batch_samples=480 * 16_000, max_samples=15 * 16_000)
    assert advice.on_batches(plan, 1) == []
    (line,) = advice.on_batches(plan, 64)
    assert "45% of what 64 processes compute is padding, 4% of what one does" in line


@pytest.mark.parametrize(
    ("threads", "cores", "processes", "said"),
    [(1, 8, 1, None), (4, 8, 2, None), (1, 8, 2, "=4"), (8, 8, 2, "=4"), (1, 2, 4, None)],
)
def test_threads_of_several_processes(monkeypatch, threads, cores, processes, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(advice, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    peers = Processes(rank=0, world_size=processes, device=torch.device("cpu"))
    lines = advice.before_training(TrainConfig(), peers)
    assert lines == [] if said is None else said in lines[0]


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(advice, "usable_cores", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    peers = Processes(rank=0, world_size=16, device=torch.device("cpu"))
    assert advice.share_of_cores(peers) == 8


def test_one_process_shards_nothing():
    peers = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    assert "train.shard" in advice.before_training(TrainConfig(shard=True), peers)[0]


@pytest.mark.parametrize(
    ("precision", "multiplies", "slowdown", "said"),
    [
        ("fp32", True, None, "--train.precision bf16 can be faster"),
        ("fp32", False, 20.0, None),
        ("bf16", True, None, None),
        ("bf16", False, 20.0, "20 times slower than float32; --train.precision fp32 is faster"),
    ],
)
def test_the_faster_precision(monkeypatch, precision, multiplies, slowdown, said):
    monkeypatch.setattr(advice, "multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(advice, "bf16_slowdown", lambda: slowdown)
    config = TrainConfig(precision=precision)
    lines = advice.on_precision(config, torch.device("cpu"))
    assert lines == [] if said is None else said in lines[0]
    assert advice.on_precision(config, torch.device("cuda")) == []
