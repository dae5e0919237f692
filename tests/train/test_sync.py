"""No step waits for the device: nothing reads a value back until a line of metrics is due."""

from __future__ import annotations

import sys

import pytest
import torch

from gmm_jepa.presets import preset
from tests.train.steps import alone, steps_of

READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")
SYSTEMS = ("gmm-anchored", "pure-jepa", "wavlm-style")


def floats_read(monkeypatch) -> list[str]:
    """Where values of tensors are read back from now on."""
    reads = []
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, _original=original, _name=name):
            frame = sys._getframe(1)
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            # Whole numbers are lengths, which CPU kernels may read; `_is_one` reads on CPUs only.
            if self.is_floating_point() and frame.f_code.co_name != "_is_one":
                reads.append(f"{_name} in {place}")
            return _original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return reads


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_reads_nothing_back(system, monkeypatch):
    step, state = steps_of(preset("smoke", system=system), peers=alone(torch.device("cpu")))
    step(0)
    reads = floats_read(monkeypatch)
    step(1)
    step(2)
    assert not reads
    state.meters.read()
    assert len(reads) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_never_waits_for_the_gpu(system):
    """PyTorch itself refuses every call that would wait."""
    peers = alone(torch.device("cuda", 0))
    step, _ = steps_of(preset("smoke", system=system), peers=peers, pinned=True)
    step(0)
    step(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
        step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
