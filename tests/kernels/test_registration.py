"""The kernels are there for CUDA tensors, and cost nothing until one comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
