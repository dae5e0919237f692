"""The environment that a command needs for null CUDA."""

from __future__ import annotations

import os
from pathlib import Path

from bench.null_cuda.build import build

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = Path(__file__).parent / "site"


def environment(*, values: bool = False, devices: int = 1) -> dict[str, str]:
    """Variables of a process that is to find so many devices that are none.

    Args:
        values: torch's operations run on the CPU and Triton's kernels in its interpreter.
        devices: how many of them.

    Raises:
        CannotBuildError: something that it takes is not there.
    """
    libraries = build()
    ours = {
        "LD_PRELOAD": _before("LD_PRELOAD", *sorted(libraries.glob("lib*.so*"))),
        "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "PYTHONPATH": _before("PYTHONPATH", SITE, REPOSITORY),
        "NULL_CUDA": "values" if values else "launches",
        "NULL_CUDA_DEVICES": str(devices),
        "GMM_JEPA_CUDA_EM": "0",
    }
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, **ours, **({"TRITON_INTERPRET": "1"} if values else {})}


def _before(name: str, *paths: Path) -> str:
    """Paths, then those that the variable holds."""
    return ":".join(filter(None, [*map(str, paths), os.environ.get(name)]))
