"""Other tiles of the mixture kernels, timed: `python -m bench.ops --device cuda --tune`.

Every kernel takes its tile from the function `config` of its own module; here a constant takes
that function's place. The first line of each case is the default. A tile that does not compile,
or whose result is off, is shown as such. To adopt one, write it into `config` with its figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench import cases, loss_cases
from bench.records import append, surroundings
from bench.shapes import Shape

# The first to try on a GPU is 64 x 64 with 4 warps: half the registers of a thread's accumulators.
TILES = [
    {"BLOCK_T": rows, "BLOCK_K": columns, "num_warps": warps, "num_stages": stages}
    for (rows, columns, warps), stages in itertools.product(
        [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
        [2, 3, 4],
    )
]
RUNS = 20


def kernels() -> dict[str, tuple]:
    """Name -> module whose `config` is swept, and the makers of its cases."""
    from gmm_jepa.kernels import gmm_log_likelihood, gmm_posterior, masked_kl

    half = torch.bfloat16
    return {
        "gmm_posterior": (gmm_posterior, cases.gmm_posterior, ((), (half,))),
        "gmm_log_likelihood": (gmm_log_likelihood, cases.gmm_log_likelihood, ((),)),
        "gmm_argmax": (gmm_log_likelihood, cases.gmm_argmax, ((),)),
        "masked_kl": (masked_kl, loss_cases.masked_kl, ((), (half,))),
    }


def sweep(shapes: list[Shape], device: str, only: str, out: Path) -> None:
    """Time every tile, print, and append to tune.jsonl in `out`."""
    if device != "cuda":
        raise SystemExit("--tune: expected --device cuda, tiles mean nothing elsewhere")
    for shape, (name, (module, make, dtypes)) in itertools.product(shapes, kernels().items()):
        for dtype in dtypes if only in name else ():
            torch.manual_seed(0)
            case = make(shape, device, *dtype)
            print(f"\n{case.name} {case.dtype} {shape.describe()}")
            for tile, milliseconds in timed(case, module, device):
                print(f"  {tile}: {milliseconds}", flush=True)
                line = {"op": case.name, "dtype": case.dtype, **shape._asdict(), "tile": tile}
                line |= {"ms": milliseconds, **surroundings(device)}
                append("tune", line, out)


def timed(case: cases.Case, module, device: str) -> Iterator[tuple[object, object]]:
    """Each tile with its median milliseconds, or why it has none."""
    from bench.ops import timer

    time_once = timer(device)
    for tile in ["default", *TILES]:
        config = module.config if tile == "default" else lambda *a, tile=tile: tile
        with mock.patch.object(module, "config", config):
            try:
                error = case.check()
            except Exception as failure:  # out of shared memory or registers: compilers differ
                yield tile, f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"
                continue
            if not error <= 1.0:
                yield tile, f"WRONG: {error:.3g} times the error allowed"
                continue
            times, host_s = [], 0.0
            for _ in range(RUNS):
                for leaf in case.with_gradient:
                    leaf.grad = None
                taken = time_once(case.run, host_s)
                times.append(taken.seconds)
                host_s = taken.host_s
        yield tile, round(1e3 * float(np.median(times)), 4)
