"""Steps on a GPU are those on a CPU: other kernels, other ways through the models, the same run."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa.presets import preset
from tests.train.steps import alone, steps_of

N_STEPS = 2


def metrics(device: str, system: str) -> dict[str, float]:
    torch.manual_seed(0)
    peers = alone(torch.device(device))
    step, meters = steps_of(preset("smoke", system=system), peers=peers)
    for i in range(N_STEPS):
        step(i)
    return meters.read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("system", ["gmm-anchored", "pure-jepa", "wavlm-style"])
def test_the_metrics_are_those_of_the_cpu(system):
    """Convolutions may round to TF32 there; times differ."""
    found, expected = metrics("cuda", system), metrics("cpu", system)
    timed = [name for name in expected if name.endswith(("_per_s", "_share"))]
    assert len(timed) < len(expected) - 5
    for name in expected.keys() - timed:
        assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name
