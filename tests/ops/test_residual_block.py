"""Residual units one after the other in one operator on CPUs: every kernel against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import fused, native, native_front_end
from tests.against_float64 import (
    KERNELS,
    assert_near,
    cotangent,
    norm,
    on_kernel,
    on_one_thread_and_two,
    results_of,
)

from .test_memory import peak_bytes

# B, T, C, dilations, lengths; a native kernel takes 16384 / C frames at once
SIZES = {
    "one frame": (2, 1, 16, (1, 3, 5), None),
    "fewer frames than taps reach": (2, 7, 16, (1, 9, 25), (7, 3)),
    "one unit": (2, 37, 32, (2,), (37, 20)),
    "five units": (1, 61, 16, (1, 2, 3, 4, 5), (58,)),
    "one row": (1, 129, 32, (1, 3, 5), (99,)),
    "many rows": (40, 5, 16, (1, 1, 1), None),
    "ragged, a row of no frames": (4, 101, 32, (1, 3, 5), (101, 1, 0, 97)),
    "no frames at all": (2, 9, 16, (1, 3, 5), (0, 0)),
    "a block": (1, 1024, 16, (1, 3, 5), None),
    "a frame more than a block": (2, 1025, 16, (1, 3, 5), (1025, 1024)),
    "several blocks": (3, 2600, 16, (1, 9, 25), (2600, 1500, 0)),
    "several blocks of 32 channels": (3, 1300, 32, (25, 1, 5), (1300, 769, 511)),
    "channels that fit no panel": (2, 60, 24, (1, 3, 5), (60, 41)),
    "odd channels": (2, 33, 5, (1, 3), (33, 8)),
    "loud": (2, 200, 16, (1, 3, 5), (200, 150)),
}
# One block, several, and in plain torch.
EACH = ("ragged, a row of no frames", "several blocks", "odd channels")


def real_frames(x: Tensor, lengths: Tensor | None) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    return torch.arange(x.shape[1]) < lengths[:, None]


def convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    y = F.conv1d(F.leaky_relu(x, 0.1).mT, weight, bias, padding=dilation, dilation=dilation)
    return y.mT


def in_torch(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    dilations: tuple[int, ...],
    lengths_frames: Tensor | None,
) -> Tensor:
    keep = real_frames(x, lengths_frames)[..., None].to(x.dtype)
    for w1, b1, w2, b2, dilation in zip(weight1, bias1, weight2, bias2, dilations):
        y = convolution(x, w1, b1, dilation) * keep
        x = x + convolution(y, w2, b2, 1) * keep
    return x


def one_by_one(x: Tensor, *weights: Tensor, dilations, lengths_frames) -> Tensor:
    for *of_unit, dilation in zip(*weights, dilations):
        x = ops.residual_unit(x, *of_unit, dilation=dilation, lengths_frames=lengths_frames)
    return x


def from_kink(values: Tensor) -> Tensor:
    """What is to be added to values (N, C) so that none is near zero: for each of the C.

    Zero comes to lie in the widest gap between values near it.
    """
    near = F.pad(values, (0, 0, 1, 1)).clamp(-0.5, 0.5)
    near[0], near[-1] = -0.5, 0.5
    near = near.sort(0).values
    widest = near.diff(dim=0).argmax(0, keepdim=True)
    return -(near.gather(0, widest) + near.gather(0, widest + 1))[0] / 2


def case_of(name: str) -> tuple[list[Tensor], dict]:
    """Biases are such that rounding takes no value across the activation's kink."""
    torch.manual_seed(0)
    B, T, C, dilations, lengths = SIZES[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    scale, U = (1e4 if name == "loud" else 1.0), len(dilations)
    x = torch.randn(B, T, C)
    real = real_frames(x, lengths)
    x = scale * (x + 0.01 * x.sign()) * real[..., None]
    weight1, weight2 = (torch.randn(U, C, C, 3) / (3 * C) ** 0.5 for _ in "12")
    bias1, bias2 = (0.1 * torch.randn(U, C) for _ in "12")
    values = x.double()
    for u, dilation in enumerate(dilations):
        hidden = convolution(values, weight1[u].double(), bias1[u].double(), dilation)
        bias1[u] += scale * from_kink(hidden[real] / scale)
        hidden = convolution(values, weight1[u].double(), bias1[u].double(), dilation)
        made = convolution(hidden * real[..., None], weight2[u].double(), bias2[u].double(), 1)
        bias2[u] += scale * from_kink((values + made)[real] / scale)
        made = convolution(hidden * real[..., None], weight2[u].double(), bias2[u].double(), 1)
        values = values + made * real[..., None]
    options = {"dilations": dilations, "lengths_frames": lengths}
    return [x, weight1, bias1, weight2, bias2], options


@pytest.fixture(params=KERNELS)
def kernel(request):
    with on_kernel(request.param, native_front_end, "_is_float32") as name:
        yield name


def exact_of(leaves: list[Tensor], options: dict) -> list[Tensor]:
    return results_of(in_torch, [leaf.double() for leaf in leaves], options)


@pytest.mark.parametrize("name", SIZES)
def test_float32_against_float64(name, kernel):
    leaves, options = case_of(name)
    got, peer = (results_of(f, leaves, options) for f in (ops.residual_block, in_torch))
    assert_near(got, peer, exact_of(leaves, options), factor=2, unit=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_float32_as_units_one_by_one(name, kernel):
    leaves, options = case_of(name)
    got, units = (results_of(f, leaves, options) for f in (ops.residual_block, one_by_one))
    for number, (a, u) in enumerate(zip(got, units, strict=True)):
        assert norm(a - u) <= 1e-6 * norm(u), number


@pytest.mark.parametrize("name", SIZES)
def test_bfloat16_as_units_one_by_one(name, kernel):
    """Rounding takes values across the kink: of both alike, and seldom of one alone."""
    leaves, options = case_of(name)
    got, units = (results_of(f, leaves, options, True) for f in (ops.residual_block, one_by_one))
    exact = exact_of(leaves, options)
    assert_near(got, units, exact, factor=1.1, unit=1e-6, size=norm)
    for number, (a, u) in enumerate(zip(got, units, strict=True)):
        assert norm(a - u) <= 4e-3 * norm(u), number


@pytest.mark.parametrize("name", SIZES)
def test_float64_is_kept(name):
    leaves, options = case_of(name)
    doubles = [leaf.double() for leaf in leaves]
    for autocast in (False, True):
        got = results_of(ops.residual_block, doubles, options, autocast)
        torch.testing.assert_close(got, exact_of(leaves, options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EACH)
def test_narrow_frames_come_out_as_float32_under_autocast(name, dtype, kernel):
    (x, *weights), options = case_of(name)
    x = x.to(dtype)
    expected, got = (
        results_of(ops.residual_block, [frames, *weights], options, True)
        for frames in (x.float(), x)
    )
    assert [t.dtype for t in got[:3]] == [torch.float32, dtype, torch.float32]
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_frames_without_autocast(dtype):
    leaves, options = case_of("ragged, a row of no frames")
    leaves = [leaf.to(dtype) for leaf in leaves]
    for a, e in zip(
        results_of(ops.residual_block, leaves, options), exact_of(leaves, options), strict=True
    ):
        assert a.dtype == dtype
        assert norm(a - e) <= 0.05 * norm(e)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_strides_change_nothing(name, autocast, kernel):
    """Nor does a gradient that is one number everywhere."""
    leaves, options = case_of(name)
    strided = [leaf.repeat_interleave(2, -1)[..., ::2] for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    results = []
    for tensors in (leaves, strided):
        tensors = [leaf.detach().requires_grad_() for leaf in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = ops.residual_block(*tensors, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
    for a, b in zip(*results, strict=True):
        if kernel == "torch" or name == "odd channels":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH[:2])
def test_the_same_bits_on_one_thread_and_two(name, autocast):
    """Of outputs; sums over frames are by thread, and the same for the same number of them."""
    leaves, options = case_of(name)
    runs = []

    def run() -> list[Tensor]:
        twice = [results_of(ops.residual_block, leaves, options, autocast) for _ in "12"]
        runs.extend(zip(*twice, strict=True))
        return twice[0][:1]

    assert all(torch.equal(a, b) for a, b in on_one_thread_and_two(run))
    assert len(runs) == 12
    assert all(torch.equal(a, b) for a, b in runs)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_a_row_comes_out_as_alone_and_padding_as_zeros(name, autocast, kernel):
    """With gradients, which those that come back on padding do not reach."""
    (x, *weights), options = case_of(name)
    lengths = options["lengths_frames"]
    real = real_frames(x, lengths)[..., None]
    grad, others = cotangent(x) * real, 1e3 * torch.randn(x.shape) * ~real

    def results(x: Tensor, grad: Tensor, lengths: Tensor | None) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *weights)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = ops.residual_block(
                *leaves, dilations=options["dilations"], lengths_frames=lengths
            )
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    out, d_x, *of_weights = results(x, grad + others, lengths)
    assert (out * ~real == 0).all()
    sums = [torch.zeros_like(w) for w in weights]
    for row, n in enumerate(lengths.tolist()):
        if not n:
            continue
        rows = slice(row, row + 1)
        alone, d_alone, *parts = results(x[rows, :n], grad[rows, :n], None)
        torch.testing.assert_close(out[rows, :n], alone, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(d_x[rows, :n], d_alone, rtol=1e-5, atol=1e-5)
        sums = [s + part for s, part in zip(sums, parts, strict=True)]
    for number, (whole, s) in enumerate(zip(of_weights, sums, strict=True)):
        assert norm(whole - s) <= 2e-6 * norm(s), number


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.skipif(not native.instruction_sets(), reason=f"native module: {native.status()}")
def test_nothing_but_what_came_in_is_kept(autocast):
    leaves, options = case_of("several blocks")
    leaves, packed = [leaf.requires_grad_() for leaf in leaves], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.data_ptr())
        return t

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.residual_block(*leaves, **options)
        with torch.no_grad():
            held = peak_bytes(lambda: ops.residual_block(*leaves, **options))
    assert set(packed) == {t.data_ptr() for t in (*leaves, options["lengths_frames"])}
    assert held <= out.nbytes + 4096
    held = peak_bytes(lambda: torch.autograd.grad(out, leaves, out.detach()))
    assert held <= sum(leaf.nbytes for leaf in leaves) + 4096


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16), (2, 9, 0)])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_nothing(shape, autocast, kernel):
    C, U = shape[2], 2
    weights = [torch.randn(s) for s in ((U, C, C, 3), (U, C)) * 2]
    options = {"dilations": (1, 3), "lengths_frames": torch.zeros(shape[0], dtype=torch.int64)}
    results = results_of(ops.residual_block, [torch.randn(shape), *weights], options, autocast)
    assert results[0].shape == shape
    assert all((g == 0).all() for g in results[2:])


@pytest.mark.parametrize(
    ("narrow", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.float64)],
    ids=["float32", "bfloat16", "float64"],
)
@pytest.mark.parametrize("name", ["ragged, a row of no frames", "odd channels"])
def test_opcheck(name, narrow, dtype):
    leaves, options = case_of(name)
    leaves = [leaf.to(dtype) for leaf in leaves]
    dilations = list(options["dilations"])
    forward, backward = (
        getattr(torch.ops.gmm_jepa, f"residual_block{end}").default for end in ("", "_backward")
    )
    for lengths in (None, options["lengths_frames"]):
        arguments = (*(leaf.requires_grad_() for leaf in leaves), lengths, dilations, narrow)
        torch.library.opcheck(forward, arguments)
        tensors = [leaf.detach() for leaf in leaves]
        grad = cotangent(tensors[0])
        torch.library.opcheck(backward, (grad, *tensors, lengths, dilations, narrow))


@pytest.mark.parametrize(
    ("shape", "dilations", "expected"),
    [
        ((2, 50, 16), (1, 3, 5), True),
        ((2, 50, 32), (1, 3, 5), True),
        ((2, 50, 16), (29,), True),
        ((2, 50, 16), (1, 9, 25), False),  # as many frames around a block as its own
        ((2, 50, 32), (1, 9), True),
        ((2, 50, 32), (1, 13), True),
        ((2, 50, 32), (1, 14), False),
        ((2, 50, 64), (1, 1), False),
        ((2, 50, 8), (1, 1), False),
        ((2, 0, 16), (1, 3, 5), False),
    ],
)
@pytest.mark.skipif(not native.instruction_sets(), reason=f"native module: {native.status()}")
def test_what_is_taken(shape, dilations, expected):
    x = torch.zeros(shape)
    assert ops.takes_residual_block(x, dilations) == expected
    assert not ops.takes_residual_block(x.double(), dilations)
    assert not ops.takes_residual_block(x.bfloat16(), dilations)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.takes_residual_block(x.bfloat16(), dilations) == expected
    with torch.autocast("cpu", torch.float16):
        assert not ops.takes_residual_block(x, dilations)
    with fused.composed():
        assert not ops.takes_residual_block(x, dilations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 7, 16, 1)}, "x: expected"),
        ({"x": torch.zeros(1, 7, 16, dtype=torch.int64)}, "x: expected"),
        ({"x": torch.zeros(1, 7, 32)}, "weight1: expected"),
        ({"weight1": torch.zeros(2, 16, 16, 5)}, "weight1: expected"),
        ({"weight2": torch.zeros(1, 16, 16, 3)}, "weight2: expected"),
        ({"bias1": torch.zeros(16)}, "bias1: expected"),
        ({"bias2": torch.zeros(2, 8)}, "bias2: expected"),
        ({"dilations": (1,)}, "weight1: expected"),
        ({"dilations": (1, 0)}, "dilations: expected"),
        ({"dilations": (2**62, 2**62)}, "dilations: expected"),
        ({"lengths_frames": torch.tensor([7, 7])}, "lengths_frames: expected"),
        ({"lengths_frames": torch.tensor([7.0])}, "lengths_frames: expected"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(1, 7, 16), "dilations": (1, 3)}
    for i in "12":
        arguments |= {f"weight{i}": torch.zeros(2, 16, 16, 3), f"bias{i}": torch.zeros(2, 16)}
    assert ops.residual_block(**arguments).shape == (1, 7, 16)
    with pytest.raises(InputError, match=message):
        ops.residual_block(**{**arguments, **change})


def test_no_units():
    weights = [torch.zeros(shape) for shape in ((0, 16, 16, 3), (0, 16)) * 2]
    with pytest.raises(InputError, match="dilations: expected"):
        ops.residual_block(torch.zeros(1, 7, 16), *weights, dilations=())


@pytest.mark.skipif(not native.instruction_sets(), reason=f"native module: {native.status()}")
@pytest.mark.parametrize("length", [-1, 102])
def test_lengths_beyond_the_frames_are_refused(length):
    leaves, options = case_of("ragged, a row of no frames")
    options["lengths_frames"] = torch.tensor([1, 2, 3, length])
    with pytest.raises(ValueError, match="lengths_frames"):
        ops.residual_block(*leaves, **options)
