"""Clocks that wait for the device, and its rate of matrix products."""

from __future__ import annotations

import platform
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

REPEATS = 5
"""Products that are timed for a rate."""


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that something takes, the device's part included."""
    wait_for(device)
    begin = perf_counter()
    work()
    wait_for(device)
    return perf_counter() - begin


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations per second of a large square matrix product, the best of `REPEATS`.

    Random numbers are drawn from a generator of its own.

    Args:
        device: where.
        precision: fp32 or bf16.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    torch.mm(a, b)
    return 2.0 * size**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(REPEATS))
