"""The CUDA EM kernels on a GPU: float64 oracles, the emulation, the same bits twice.

At D = 73 to 80 there are two screens, of mma and of wgmma; a test's name says which it runs, so
that ``-k wgmma`` and ``-k "not wgmma"`` can have processes of their own: an illegal access spoils
all that follows in its process.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.ops import native, native_mixture

_spec = importlib.util.spec_from_file_location(
    "gmm_jepa_emulation_cases", Path(__file__).with_name("test_cuda_emulation.py")
)
emulation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulation)

if not native.cuda_architectures():
    pytest.skip(f"CUDA part of the native module: {native.cuda_status()}", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SCREENS = ("mma", "wgmma")
CASES_OF_BOTH = (
    "usual",
    "one_component",
    "offset_1e3_D_80",
    "speech_like",
    "some_unscreened",
    "columns_first_D_80",
)
SHAPES = [(270_001, 3, 2), (500, 8192, 40), (90, 70, 200), (500, 100, 72), (500, 100, 81)]
SHAPES_OF_BOTH = [(3000, 1024, 80), (65_600, 130, 80), (252_100, 33, 80)]
"""The last one is a chunk of 251,904 frames, and one of 196 whose last tile has four."""


def gpu(test):
    return pytest.mark.gpu(needs_gpu(test))


def with_screens(name, values, values_of_both):
    """Of `name`, all values with the one screen, those of both with the other, too."""
    cases = [("mma", value) for value in (*values, *values_of_both)]
    cases += [("wgmma", value) for value in values_of_both]
    ids = [f"{screen}-{str(value).replace(' ', '')}" for screen, value in cases]
    return pytest.mark.parametrize(("screen", name), cases, indirect=["screen"], ids=ids)


both_screens = pytest.mark.parametrize("screen", SCREENS, indirect=True)


@pytest.fixture(autouse=True)
def screen(request, monkeypatch):
    name = getattr(request, "param", "mma")
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if name == "wgmma" and not (is_hopper and "sm_90a" in native.cuda_architectures()):
        pytest.skip("no products of warpgroups")
    monkeypatch.setenv("GMM_JEPA_UNPROVEN_KERNELS", "1" if name == "wgmma" else "0")
    return name


@pytest.fixture(autouse=True)
def filled_memory():
    """New memory has NaN, and all bits of the workspace are set."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_cuda(frames, *mixture, hard=False):
    strides = frames.stride()
    x = torch.empty_strided(frames.shape, strides, dtype=frames.dtype, device="cuda")
    x.copy_(frames)
    got = native_mixture.em_statistics_cuda(x, *(p.cuda() for p in mixture), hard)
    return tuple(field.cpu() for field in got)


def refined_on_cuda(frames, *mixture, hard=False):
    """What `on_cuda` gives, pairs that the screen left, chunks whose pairs were not kept."""
    plain, refined = native._native.em_statistics_cuda, []

    def counted(*arguments):
        plain(*arguments)
        (*_, K, D), workspace, place = (arguments[i] for i in (2, 5, 6))
        refined.append(native._native.em_refined(workspace[0], K, D, place))

    with mock.patch.object(native._native, "em_statistics_cuda", counted):
        got = on_cuda(frames, *mixture, hard=hard)
    return got, *refined[0]


def pairs_emulated(frames, mixture):
    plain, pairs = native._native.em_statistics_emulated, []

    def counted(*arguments):
        pairs.append(plain(*arguments))

    with mock.patch.object(native._native, "em_statistics_emulated", counted):
        native_mixture.em_statistics_emulated(frames, *mixture)
    return pairs[0]


def hard_statistics(frames, mixture):
    """Float64, by the component that the CPU's kernel finds best."""
    log_weights, means, variances = mixture
    labels = native_mixture.topk(frames, *mixture, 1, 1.0)[1][:, 0]
    x = frames.double()
    squares = (x - means[labels]).square() / variances[labels]
    constants = log_weights - 0.5 * (variances.log() + math.log(2.0 * math.pi)).sum(1)
    best = constants[labels] - 0.5 * squares.sum(1)
    first = torch.zeros_like(means).index_add_(0, labels, x)
    second = torch.zeros_like(means).index_add_(0, labels, x.square())
    return labels.bincount(minlength=len(means)).double(), first, second, best.sum()


@gpu
@with_screens(
    "name", [name for name in emulation.CASES if name not in CASES_OF_BOTH], CASES_OF_BOTH
)
def test_statistics_are_exact(name):
    emulation.assert_statistics(*emulation.CASES[name](), on_cuda)


@gpu
@both_screens
def test_hard_assignment():
    frames, mixture = emulation.CASES["usual"]()
    expected = native_mixture.em_statistics_emulated(frames, *mixture, hard=True)
    emulation.assert_close(on_cuda(frames, *mixture, hard=True), expected)


@gpu
@with_screens("shape", SHAPES, SHAPES_OF_BOTH)
def test_shapes(shape):
    frames, mixture = emulation.cases.drawn(*shape)
    exact = native_mixture.em_statistics(frames, *mixture)
    emulation.assert_close(on_cuda(frames, *mixture), exact)


@gpu
@both_screens
@pytest.mark.parametrize("D", range(73, 80))
def test_a_last_step_of_the_depth_that_is_not_full(D):
    frames, mixture = emulation.cases.drawn(300, 130, D)
    exact = native_mixture.em_statistics(frames, *mixture)
    emulation.assert_close(on_cuda(frames, *mixture), exact)


@gpu
@both_screens
@pytest.mark.parametrize("n", [1, 16, 17, 385, 400, 401, 576])
def test_a_last_tile_that_is_not_full(n):
    """A warp of wgmma has 16 frames: it must write zeros where those of a tile are missing."""
    frames, mixture = emulation.cases.drawn(n, 130, 80)
    got, pairs, _ = refined_on_cuda(frames, *mixture)
    emulation.assert_close(got, native_mixture.em_statistics(frames, *mixture))
    assert pairs == pytest.approx(pairs_emulated(frames, mixture), rel=0.03, abs=3)


@gpu
@both_screens
@pytest.mark.parametrize("name", ["usual", "speech_like"])
def test_the_screen_leaves_no_more_pairs_than_it_should(name):
    frames, mixture = emulation.CASES[name]()
    _, pairs, spilled = refined_on_cuda(frames, *mixture)
    assert spilled == 0
    assert pairs == pytest.approx(pairs_emulated(frames, mixture), rel=0.03)
    assert pairs < 0.3 * len(frames) * len(mixture.means)


@gpu
@pytest.mark.parametrize("name", ["usual", "D_13", "offset", "wide"])
def test_statistics_of_nearest_centroids(name):
    frames, mixture = emulation.CASES[name]()
    expected = ops.kmeans_statistics(frames.double(), mixture.means)
    once, again = (ops.kmeans_statistics(frames.cuda(), mixture.means.cuda()) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    emulation.assert_close(tuple(field.cpu() for field in once), expected)


@gpu
@pytest.mark.parametrize("hard", [False, True])
@with_screens("D", [5], [80])
def test_more_pairs_than_are_kept(D, hard):
    """17.6 M pairs of the first chunk matter, 16.8 M would fit: they are computed again. Those of
    the second one are kept."""
    frames, mixture = emulation.cases.drawn(260_000, 70, D, variance=(50.0, 90.0))
    exact = (
        hard_statistics(frames, mixture) if hard else native_mixture.em_statistics(frames, *mixture)
    )
    got, pairs, spilled = refined_on_cuda(frames, *mixture, hard=hard)
    assert spilled == 1
    assert 0.95 * 260_000 * 70 < pairs <= 260_000 * 70
    emulation.assert_close(got, exact)


@gpu
@both_screens
def test_rows_that_cannot_be_copied_by_pieces():
    """D = 80 at an address, and at a stride, that is no multiple of 16 bytes."""
    frames, mixture = emulation.cases.drawn(3000, 100, 80)
    expected = native_mixture.em_statistics(frames, *mixture)
    wide = torch.zeros(3000, 83, device="cuda")
    flat = torch.zeros(3000 * 80 + 1, device="cuda")
    moved = tuple(p.cuda() for p in mixture)
    for view in (wide[:, 1:81], wide[:, :80], flat[1:].view(3000, 80)):
        view.copy_(frames)
        got = native_mixture.em_statistics_cuda(view, *moved)
        emulation.assert_close(tuple(field.cpu() for field in got), expected)


@gpu
def test_rows_too_far_apart():
    far = torch.zeros(3, device="cuda").as_strided((1, 3), (1 << 30, 1))
    mixture = tuple(p.cuda() for p in emulation.cases.drawn(1, 2, 3)[1])
    with pytest.raises(RuntimeError, match="4 GB apart, got 1073741824 values of 4 bytes"):
        native_mixture.em_statistics_cuda(far, *mixture)


@gpu
@with_screens("shape", [(150_000, 100, 24)], [(60_000, 130, 80)])
def test_same_bits_twice(shape):
    frames, mixture = emulation.cases.drawn(*shape)
    once, again = (on_cuda(frames, *mixture) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@gpu
@with_screens("D", [8], [80])
def test_a_frame_that_is_not_finite_spoils_its_results(D):
    for value in (math.nan, math.inf, -math.inf):
        frames, mixture = emulation.cases.drawn(100, 30, D)
        frames[57, 3] = value
        assert all(bool(field.isnan().all()) for field in on_cuda(frames, *mixture))


@gpu
@both_screens
def test_a_frame_too_far_away_for_the_screen():
    """Every component is computed for it, and it spoils none but the one that it goes to."""
    frames, mixture = emulation.cases.drawn(100, 130, 80)
    frames[57] = 1e30
    got, pairs, _ = refined_on_cuda(frames, *mixture)
    assert pairs == pytest.approx(pairs_emulated(frames, mixture), rel=0.03)
    expected = native_mixture.em_statistics(frames, *mixture)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-10)
    near = expected[1].abs().amax(1) < 1e20
    assert near.sum() == len(near) - 1
    emulation.assert_close(
        [field[near] for field in got[:3]], [field[near] for field in expected[:3]]
    )


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
    native_mixture.em_statistics_cuda(frames.cuda(), *moved)
    moved[1].add_(1.0)
    got = native_mixture.em_statistics_cuda(frames.cuda(), *moved)
    expected = native_mixture.em_statistics(frames, *(p.cpu() for p in moved))
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
            native.matrix_of(frames),
            False,
            operands.addresses(),
            tuple(o.data_ptr() for o in out),
            (False, 34.0),
            (out[0].data_ptr(), n_bytes),
            (0, 0),
        )
