"""The ops under pytest-benchmark, over the shapes of `bench.shapes`; collected when asked for:

    python -m pytest bench                        # the small shape
    python -m pytest bench --benchmark-json out.json -k "paper and masked_kl"

Each op is first compared with its oracle; one that is off is a failure, not a measurement. The
ratio to peers, floors and JSON lines of `python -m bench.ops` are not repeated here.
"""

from __future__ import annotations

import pytest
import torch

from bench.registry import Maker, makers
from bench.shapes import SHAPES

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ON_CPU, ON_CUDA = makers("cpu"), makers("cuda")


def _measure(benchmark, make: Maker, shape: str, device: str) -> None:
    torch.manual_seed(0)
    made = make(SHAPES[shape])
    error = made.check()
    assert error <= 1.0, f"{error:.3g} times the error allowed"
    benchmark.group = f"{made.name} {shape} {device}"
    benchmark.extra_info |= {"shape": SHAPES[shape].describe(), "error_of_allowed": error}

    def clear() -> None:
        for leaf in made.with_gradient:
            leaf.grad = None

    def run() -> None:
        made.run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=clear, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("case", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cpu(benchmark, case, shape, request):
    """One case; beyond the small shape only when named with -k."""
    if shape != "small" and shape not in request.config.option.keyword:
        pytest.skip(f"minutes on a CPU: ask for it with -k {shape}")
    _measure(benchmark, ON_CPU[case], shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_CUDA)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(benchmark, case, shape):
    """One case, in wall time with the device's answer waited for."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _measure(benchmark, ON_CUDA[case], shape, "cuda")
