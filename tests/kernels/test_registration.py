"""The kernels are there for CUDA tensors, and cost nothing until one comes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmm_jepa.ops import density, fused, residual
from gmm_jepa.ops.snake import _snake_backward, _snake_narrow

from .strides import moved

OPS = (
    "gmm_posterior",
    "gmm_log_likelihood",
    "gmm_topk",
    "masked_kl",
    "masked_kl_ensemble",
    "masked_kl_targets",
    "masked_cross_entropy",
    "masked_mse",
)


UNPROVEN = {
    density._density_attention: ("density_attention", "density_attention"),
    density._density_attention_backward: (
        "density_attention_backward",
        "density_attention_backward",
    ),
    _snake_narrow: ("snake", "snake"),
    _snake_backward: ("snake", "snake_backward"),
    residual._unit: ("residual_unit", "residual_unit"),
    residual._unit_backward: ("residual_unit_backward", "residual_unit_backward"),
}
"""Ops, and file and function of their launchers."""


def inputs_of(op: torch.library.CustomOpDef) -> tuple:
    """On a CPU."""
    x, C = torch.randn(2, 9, 16, dtype=torch.bfloat16), 16
    gaussians, a, lengths = torch.rand(2, 4, 4) + 0.1, torch.rand(C) + 0.1, torch.tensor([9, 8])
    weights, biases = torch.randn(2, C, C, 3), torch.randn(2, C)
    unit = (weights[0], biases[0], weights[1], biases[1], lengths, 3)
    before = (x,) if "backward" in op._name else ()
    if op is residual._unit:
        return (x, *unit, True, False)
    if op is residual._unit_backward:
        return (x, x, x, *unit, False)
    return (*before, x, *(gaussians if "density" in op._name else (a,)), lengths)


@pytest.mark.parametrize("op", UNPROVEN, ids=lambda op: op._name)
def test_unproven_kernels_run_where_they_are_asked_for_alone(op, monkeypatch):
    """What is registered for CUDA, called on a CPU: it takes the launcher, or does without."""
    module, function = UNPROVEN[op]
    launched = []
    monkeypatch.setattr(
        importlib.import_module(f"gmm_jepa.kernels.{module}"),
        function,
        lambda *arguments: launched.append(function) or (None, None),
    )
    on_cuda, inputs = op._op._backend_fns["cuda"], inputs_of(op)
    monkeypatch.setattr(fused, "uses_unproven", False)
    assert on_cuda(*inputs) is not None
    assert not launched
    monkeypatch.setattr(fused, "uses_unproven", True)
    on_cuda(*inputs)
    assert launched == [function]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cases_elsewhere_keep_their_strides(dtype):
    for tensor in (
        torch.randn(3, 5, 8)[1:, :, ::2],
        torch.randn(3, 8, 5).mT,
        torch.ones(()).expand(3, 5, 8),
        torch.randn(3, 1, 4).expand(3, 5, 4),
        torch.randn(3, 0, 4),
    ):
        copy = moved(tensor, "cpu", dtype)
        assert copy.dtype == dtype
        assert copy.stride() == tensor.stride()
        assert torch.equal(copy, tensor.to(dtype))


@pytest.mark.parametrize("op", OPS)
def test_ops_have_a_cuda_kernel(op):
    import gmm_jepa  # noqa: F401

    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gmm_jepa::{op}", "CUDA")


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import gmm_jepa; "
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_the_package_imports():
    code = (
        "import sys; sys.modules['triton'] = None; import gmm_jepa.ops as ops, torch; "
        "from gmm_jepa.ops import triton_gmm; assert not triton_gmm.available(); "
        "key = 'gmm_jepa::masked_mse'; "
        "assert not torch._C._dispatch_has_kernel_for_dispatch_key(key, 'CUDA')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_opcheck_with_the_kernels_behind_the_ops(device):
    script = Path(__file__).with_name("opcheck.py")
    subprocess.run([sys.executable, script, device], check=True)
