"""The package's way through CUDA where there is no GPU: `bench.null_cuda` runs some of its tests.

`make null-cuda` runs the others that it can.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.null_cuda.build import CannotBuildError
from bench.null_cuda.environment import environment
from tests.conftest import REPOSITORY


def variables(*, values: bool) -> dict[str, str]:
    """The environment of a process with null CUDA; skips where that cannot be built."""
    try:
        found = environment(values=values, devices=2)
    except CannotBuildError as error:
        pytest.skip(f"no null CUDA: {error}")
    return {name: value for name, value in found.items() if not name.startswith("PYTEST")}


def run(*command: str, values: bool) -> subprocess.CompletedProcess[str]:
    """Python with null CUDA."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=variables(values=values),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_never_waits_and_launches_what_can_be(tmp_path):
    """By the library's own counts, which see what Triton does, too."""
    command = ("-m", "bench.host_time", "--preset", "smoke", "--rows", "4", "--seconds", "1")
    done = run(*command, "--steps", "4", "--out", str(tmp_path), values=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads((tmp_path / "host_time.jsonl").read_text())
    assert line["launches"] > 500
    assert line["waits"] == line["impossible"] == 0


def test_what_is_counted_and_refused():
    program = """
import torch
from bench.null_cuda.counts import counts
x = torch.ones(2, 8, device="cuda")
before = counts()
y = x + x
between = counts()
y.cpu()
print(*between.since(before), *counts().since(between))
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        y.sum().item()
except RuntimeError as error:
    print("a wait while a graph is recorded" in str(error))
"""
    done = run("-c", program, values=False)
    assert done.stdout.splitlines() == ["1 0 0 0 0 0 2 0", "True"], done.stdout + done.stderr


def test_steps_and_averages_are_those_of_the_cpu():
    """Of all kernels that take part, Triton's in its interpreter."""
    selected = ["tests/train/test_steps_on_cuda.py", "tests/ops/test_ema.py"]
    options = ("-m", "gpu", "-k", "not pure-jepa and not wavlm-style", "-p", "no:cacheprovider")
    done = run("-m", "pytest", *options, *selected, values=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "28 passed" in done.stdout
    assert "skipped" not in done.stdout


def test_values_where_memory_is_shared_or_moved():
    """Shapes changed in place, sizes of `out`, one storage seen twice, seeds, devices."""
    program = """
import torch
x = torch.arange(6.0, device="cuda").reshape(2, 3)
assert x.clone().t_().shape == (3, 2)
out = torch.empty(0, device="cuda")
torch.add(x, 1, out=out)
assert out.tolist() == (x.cpu() + 1).tolist()
x[:, 1:].mul_(2)
assert x.tolist() == [[0, 2, 4], [3, 8, 10]]
z = torch.complex(x, x).conj().imag.clone()
assert z.tolist() == (-x).tolist()
first, second = (
    torch.rand(5, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) for _ in "12"
)
assert first.tolist() == second.tolist()
before = torch.get_rng_state()
torch.rand(5, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
assert torch.get_rng_state().equal(before)
a, b = [torch.ones(3, device="cuda")], [torch.full((3,), 2.0, device="cuda")]
torch._foreach_add_(a, b)
assert a[0].tolist() == [3, 3, 3]
assert torch.zeros(3, device="cuda:1").device.index == 1
for wrong in (
    lambda: x + torch.ones(2, 3),
    lambda: torch.ones(3) + x.sum(),
    lambda: x.index_select(0, torch.tensor([0])),
    lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
):
    try:
        wrong()
    except RuntimeError:
        continue
    raise AssertionError("took tensors of two devices")
print("done")
"""
    done = run("-c", program, values=True)
    assert done.stdout == "done\n", done.stderr[-3000:]
