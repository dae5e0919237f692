"""The CUDA EM kernels on a GPU: float64 oracles, the emulation, the same bits twice."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmm_jepa.ops import native

_spec = importlib.util.spec_from_file_location(
    "gmm_jepa_emulation_cases", Path(__file__).with_name("test_cuda_emulation.py")
)
emulation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulation)

if not native.cuda_architectures():
    pytest.skip(f"CUDA part of the native module: {native.cuda_status()}", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def gpu(test):
    return pytest.mark.gpu(needs_gpu(test))


def on_cuda(frames, *mixture, hard=False):
    strides = frames.stride()
    x = torch.empty_strided(frames.shape, strides, dtype=frames.dtype, device="cuda")
    x.copy_(frames)
    got = native.em_statistics_cuda(x, *(p.cuda() for p in mixture), hard)
    return tuple(field.cpu() for field in got)


@gpu
@pytest.mark.parametrize("name", emulation.CASES)
def test_statistics_are_exact(name):
    emulation.assert_statistics(*emulation.CASES[name](), on_cuda)


@gpu
def test_hard_assignment():
    frames, mixture = emulation.CASES["usual"]()
    expected = native.em_statistics_emulated(frames, *mixture, hard=True)
    emulation.assert_close(on_cuda(frames, *mixture, hard=True), expected)


@gpu
@pytest.mark.parametrize(
    "shape",
    [(270_001, 3, 2), (3000, 1024, 80), (65_600, 130, 80), (500, 8192, 40), (90, 70, 200)],
)
def test_shapes(shape):
    frames, mixture = emulation.cases.drawn(*shape)
    exact = native.em_statistics(frames, *mixture)
    emulation.assert_close(on_cuda(frames, *mixture), exact)


@gpu
@pytest.mark.parametrize("hard", [False, True])
def test_more_pairs_than_are_kept(hard):
    """17.6 M pairs of the first chunk matter, 16.8 M would fit: they are computed again."""
    frames, mixture = emulation.cases.drawn(262_144, 70, 5, variance=(50.0, 90.0))
    expected = native.em_statistics_emulated(frames, *mixture, hard=hard)
    emulation.assert_close(on_cuda(frames, *mixture, hard=hard), expected)


@gpu
def test_rows_that_cannot_be_copied_by_pieces():
    """D = 80 at an address, and at a stride, that is no multiple of 16 bytes."""
    frames, mixture = emulation.cases.drawn(3000, 100, 80)
    expected = native.em_statistics(frames, *mixture)
    wide = torch.zeros(3000, 83, device="cuda")
    flat = torch.zeros(3000 * 80 + 1, device="cuda")
    moved = tuple(p.cuda() for p in mixture)
    for view in (wide[:, 1:81], wide[:, :80], flat[1:].view(3000, 80)):
        view.copy_(frames)
        got = native.em_statistics_cuda(view, *moved)
        emulation.assert_close(tuple(field.cpu() for field in got), expected)


@gpu
def test_same_bits_twice():
    frames, mixture = emulation.cases.drawn(150_000, 100, 24)
    once, again = (on_cuda(frames, *mixture) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@gpu
def test_a_frame_that_is_not_finite_spoils_its_results():
    frames, mixture = emulation.cases.drawn(100, 30, 8)
    frames[57, 3] = float("nan")
    assert all(bool(field.isnan().all()) for field in on_cuda(frames, *mixture))


@gpu
@pytest.mark.parametrize(("switch", "used"), [("1", True), ("0", False)])
def test_the_operator_uses_it_unless_it_is_turned_off(switch, used):
    program = (
        "import torch; from gmm_jepa import ops; from gmm_jepa.ops import native\n"
        "calls = []; plain = native._native.em_statistics_cuda\n"
        "native._native.em_statistics_cuda = lambda *a: (calls.append(1), plain(*a))\n"
        "m = ops.Mixture(torch.zeros(2), torch.randn(2, 3), torch.ones(2, 3))\n"
        "m = ops.Mixture(*(p.cuda() for p in m))\n"
        "assert ops.em_statistics(torch.randn(9, 3).cuda(), m).counts.isfinite().all()\n"
        f"assert bool(calls) is {used}\n"
    )
    environment = os.environ | {"GMM_JEPA_CUDA_EM": switch}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@gpu
def test_a_mixture_changed_in_place_is_packed_anew():
    frames, mixture = emulation.cases.drawn(500, 20, 8)
    moved = tuple(p.cuda() for p in mixture)
    native.em_statistics_cuda(frames.cuda(), *moved)
    moved[1].add_(1.0)
    got = native.em_statistics_cuda(frames.cuda(), *moved)
    expected = native.em_statistics(frames, *(p.cpu() for p in moved))
    emulation.assert_close(tuple(field.cpu() for field in got), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_error_says_so():
    frames, mixture = emulation.cases.drawn(4, 2, 3)
    operands = emulation.cuda_em.pack(mixture)
    out = tuple(torch.empty(6, dtype=torch.float64) for _ in range(4))
    n_bytes = native._native.em_workspace_bytes(2, 3)
    assert native._native.cuda_device_count() == 0
    with pytest.raises(RuntimeError, match="no CUDA device"):
        native._native.em_statistics_cuda(
            native._matrix(frames),
            False,
            operands.addresses(),
            tuple(o.data_ptr() for o in out),
            False,
            34.0,
            (out[0].data_ptr(), n_bytes),
            (0, 0),
        )
