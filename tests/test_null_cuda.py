"""The package's way through CUDA where there is no GPU: `bench.null_cuda` runs some of its tests.

`make null-cuda` runs the others that it can.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.null_cuda.build import CannotBuildError
from bench.null_cuda.environment import environment
from tests.conftest import REPOSITORY


def variables(*, values: bool) -> dict[str, str]:
    """The environment of a process with null CUDA; skips where that cannot be built."""
    try:
        found = environment(values=values)
    except CannotBuildError as error:
        pytest.skip(f"no null CUDA: {error}")
    return {name: value for name, value in found.items() if not name.startswith("PYTEST")}


def gpu_tests(*selected: str, values: bool) -> str:
    """What pytest says in the end of tests marked gpu, all of which must pass."""
    options = ["-o", "addopts=-q --strict-markers --import-mode=importlib", "-m", "gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *selected],
        cwd=REPOSITORY,
        env=variables(values=values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_a_step_never_waits_for_the_device():
    assert "3 passed" in gpu_tests("tests/train/test_sync.py", values=False)


def test_steps_and_averages_are_those_of_the_cpu():
    """Of all kernels that take part, Triton's in its interpreter."""
    selected = ["tests/train/test_steps_on_cuda.py", "tests/ops/test_ema.py"]
    said = gpu_tests(*selected, "-k", "not pure-jepa and not wavlm-style", values=True)
    assert " passed" in said
    assert "skipped" not in said


def test_counts():
    """Launches and waits, in a process of its own."""
    program = """
import torch
from bench.null_cuda.counts import counts
x = torch.ones(2, 8, device="cuda")
before = counts()
y = x + x
between = counts()
y.cpu()
print(*between.since(before), counts().waits > between.waits)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=variables(values=False),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 0 0 0 True\n", done.stderr
