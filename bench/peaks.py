"""Peak rates of a device, from which floors are computed. Unknown devices have none."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from gmm_jepa.train.precision import bf16_slowdown


class Peaks(NamedTuple):
    """Rates that the device reaches in practice, not those of its data sheet."""

    bytes_per_s: float
    """bytes read and written together"""
    flops_per_s: dict[str, float]
    """matrix products by kind; "float16 in three" and "tf32 in three" are float32 made of three
    products of these"""


_HOPPER = {
    "bfloat16": 790e12,
    "float16 in three": 790e12 / 3,
    "tf32": 380e12,
    "tf32 in three": 380e12 / 3,
    "float32": 67e12,
}
MEASURED_BEFORE = {
    "H100": Peaks(3.0e12, _HOPPER),
    "H200": Peaks(4.3e12, _HOPPER),
}


def peaks_of(device: str) -> Peaks | None:
    """Of the first CUDA device by name, or of this CPU by measurement; None where unknown."""
    if device == "cpu":
        return _of_this_cpu()
    name = torch.cuda.get_device_name()
    return next((peaks for part, peaks in MEASURED_BEFORE.items() if part in name), None)


def _of_this_cpu() -> Peaks:
    """Best of several: products of 2,048 squared, a copy of 128 MB and a scaling in place.

    A copy also reads what it is going to write over, which is not counted.
    """
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    pass_s = min(_best(lambda: target.copy_(source)), _best(lambda: source.mul_(0.5)))
    a, b = torch.randn(2, 2048, 2048)
    rates = {"float32": 2.0 * 2048**3 / _best(lambda: torch.mm(a, b))}
    rates["bfloat16"] = rates["float32"]
    if not bf16_slowdown():
        a, b = a.bfloat16(), b.bfloat16()
        rates["bfloat16"] = 2.0 * 2048**3 / _best(lambda: torch.mm(a, b))
    return Peaks(2 * 4 * source.numel() / pass_s, rates)


def _best(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)
