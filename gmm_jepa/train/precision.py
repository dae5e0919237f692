"""Whether lower precision pays on this CPU."""

from __future__ import annotations

import time

import torch

_SIDE = 256


def bf16_over_fp32() -> float:
    """Rate of bfloat16 matrix products on this CPU over that of float32 ones, in about 0.1 s.

    Above one where the processor multiplies bfloat16; a tenth or less where it does not.
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
    return seconds[0] / seconds[1]
