"""Whether lower precision pays on this CPU."""

from __future__ import annotations

import time

import torch

_SIDE = 256

_EMULATES = 2.0
"""Times slower. A processor that multiplies bfloat16 is near one at this size, at times beyond it
when it is shared (0.7 to 1.3, one Xeon with AMX), one that does not at ten and more."""


def bf16_slowdown() -> float | None:
    """How many times slower than float32's are bfloat16 products here, measured in about 0.1 s.

    None where this CPU multiplies bfloat16.
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2, _SIDE, _SIDE, dtype=dtype)
        torch.mm(a, b)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
    times_slower = seconds[1] / seconds[0]
    return times_slower if times_slower > _EMULATES else None
