"""Strided convolution of a waveform on CPUs: every kernel against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import native_front_end
from tests.against_float64 import (
    KERNELS,
    assert_near,
    cotangent,
    needs_native,
    on_kernel,
    on_one_thread_and_two,
    results_of,
)

from .test_memory import peak_bytes

# B, S, C, K, stride; a native kernel takes 512 frames at once
SIZES = {
    "one frame": (2, 22, 16, 22, 8),
    "one sample": (1, 1, 16, 1, 3),
    "odd numbers": (3, 331, 17, 13, 3),
    "samples behind the last frame": (2, 103, 16, 24, 8),
    "one channel": (2, 50, 1, 4, 2),
    "one tap": (2, 40, 8, 1, 1),
    "frames that share no sample": (2, 97, 16, 5, 11),
    "two panels": (2, 200, 32, 24, 8),
    "channels beyond a panel": (1, 150, 130, 9, 4),
    "more taps than a tile": (2, 300, 24, 67, 5),
    "a block": (1, 512 * 2 + 6, 16, 8, 2),
    "a frame more than a block": (1, 513 * 2 + 6, 16, 8, 2),
    "several blocks": (2, 1501 * 3 + 4, 48, 7, 3),
    "many rows": (40, 40, 16, 8, 4),
    "loud": (2, 400, 16, 24, 8),
}
# Where a kernel's ends lie, and of one block.
EACH = ("several blocks", "odd numbers")


def in_torch(
    x: Tensor, taps: Tensor, bias: Tensor, ends: Tensor, *, last: Tensor, stride: int
) -> Tensor:
    y = F.conv1d(x[:, None], taps[:, None], bias, stride=stride).mT
    for frame, end in zip((torch.zeros_like(last), last), ends.unbind(1)):
        here = F.one_hot(frame, y.shape[1])[..., None].to(y.dtype)
        y = y - here * end[:, None]
    return y


def case_of(name: str) -> tuple[list[Tensor], dict]:
    """The first row's last frame is the last one, the second row's the first one."""
    torch.manual_seed(0)
    B, S, C, K, stride = SIZES[name]
    T = (S - K) // stride + 1
    last = torch.randint(T, (B,))
    last[:2] = torch.tensor([T - 1, 0])[:B]
    x = (1e4 if name == "loud" else 1.0) * torch.randn(B, S)
    leaves = [x, torch.randn(C, K) / K**0.5, torch.randn(C), torch.randn(B, 2, C)]
    return leaves, {"last": last, "stride": stride}


@pytest.fixture(params=KERNELS)
def kernel(request):
    with on_kernel(request.param, native_front_end, "_is_float32") as name:
        yield name


@pytest.mark.parametrize("with_x", [False, True], ids=["weights", "waveform too"])
@pytest.mark.parametrize("name", SIZES)
def test_float32_against_float64(name, with_x, kernel):
    (x, *weights), options = case_of(name)

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.to(dtype) for leaf in weights]
        if with_x:
            return results_of(function, [x.to(dtype), *leaves], options)
        return results_of(partial(function, x.to(dtype)), leaves, options)

    got, peer = (results(f, torch.float32) for f in (ops.waveform_conv, in_torch))
    assert_near(got, peer, results(in_torch, torch.float64), factor=2, unit=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_float64_is_kept(name):
    leaves, options = case_of(name)
    doubles = [leaf.double() for leaf in leaves]
    exact = results_of(in_torch, doubles, options)
    for autocast in (False, True):
        got = results_of(ops.waveform_conv, doubles, options, autocast)
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_rounds_nothing(name, dtype, kernel):
    """Gradients of what came in narrow are rounded to that."""
    (x, *weights), options = case_of(name)
    weights = [leaf.to(dtype) for leaf in weights]
    function = partial(ops.waveform_conv, x.to(dtype).float())
    expected = results_of(function, [leaf.float() for leaf in weights], options)
    got = results_of(partial(ops.waveform_conv, x.to(dtype)), weights, options, True)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype, dtype]
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_waveforms_without_autocast(dtype):
    leaves, options = case_of("odd numbers")
    leaves = [leaf.to(dtype) for leaf in leaves]
    exact = results_of(in_torch, [leaf.double() for leaf in leaves], options)
    for a, e in zip(results_of(ops.waveform_conv, leaves, options), exact, strict=True):
        assert a.dtype == dtype
        assert (a - e).norm() <= 0.01 * e.norm()


@pytest.mark.parametrize("name", EACH)
def test_strides_change_nothing(name, kernel):
    """Nor does a gradient that is one number everywhere."""
    leaves, options = case_of(name)
    strided = [leaf.repeat_interleave(2, -1)[..., ::2] for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    results = []
    for x, *weights in (leaves, strided):
        weights = [leaf.detach().requires_grad_() for leaf in weights]
        out = ops.waveform_conv(x, *weights, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), weights)])
    for a, b in zip(*results, strict=True):
        if kernel == "torch":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["several blocks", "many rows"])
@needs_native
def test_the_same_bits_on_one_thread_and_two(name):
    (x, *weights), options = case_of(name)
    function = partial(ops.waveform_conv, x)
    pairs = on_one_thread_and_two(lambda: results_of(function, weights, options))
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_native
def test_the_waveform_and_the_taps_alone_are_kept():
    """No window of samples is written out, neither way."""
    (x, *weights), options = case_of("several blocks")
    weights = [leaf.requires_grad_() for leaf in weights]
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ops.waveform_conv(x, *weights, **options)
    assert set(packed) == {t.data_ptr() for t in (x, weights[0], options["last"])}
    with torch.no_grad():
        held = peak_bytes(lambda: ops.waveform_conv(x, *weights, **options))
    assert held <= out.nbytes + 4096
    held = peak_bytes(lambda: torch.autograd.grad(out, weights, out.detach()))
    assert held <= sum(leaf.nbytes for leaf in weights) + 4096


def test_no_rows(kernel):
    leaves, options = case_of("odd numbers")
    x, taps, bias, ends = leaves
    options["last"] = options["last"][:0]
    out, d_x, *gradients = results_of(ops.waveform_conv, [x[:0], taps, bias, ends[:0]], options)
    assert (out.shape, d_x.shape) == ((0, 107, 17), (0, 331))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("with_x", [False, True], ids=["weights", "waveform too"])
def test_opcheck(with_x):
    (x, *weights), options = case_of("odd numbers")
    last, stride = options["last"], options["stride"]
    weights = [leaf.requires_grad_() for leaf in weights]
    forward, backward = (
        getattr(torch.ops.gmm_jepa, name).default
        for name in ("waveform_conv", "waveform_conv_backward")
    )
    torch.library.opcheck(forward, (x.requires_grad_(with_x), *weights, last, stride))
    x, taps, *rest = (t.detach() for t in (x, *weights))
    grad = cotangent(forward(x, taps, *rest, last, stride))
    torch.library.opcheck(backward, (grad, x, taps, last, stride, with_x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40, 1)}, "x, taps: expected"),
        ({"x": torch.zeros(2, 7)}, "x, taps: expected"),
        ({"taps": torch.zeros(16, 1, 8)}, "x, taps: expected"),
        ({"taps": torch.zeros(16, 0)}, "x, taps: expected"),
        ({"stride": 0}, "x, taps: expected"),
        ({"bias": torch.zeros(15)}, "bias: expected"),
        ({"ends": torch.zeros(2, 16)}, "ends, last: expected"),
        ({"ends": torch.zeros(3, 2, 16)}, "ends, last: expected"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, "ends, last: expected"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "x": torch.zeros(2, 40),
        "taps": torch.zeros(16, 8),
        "bias": torch.zeros(16),
        "ends": torch.zeros(2, 2, 16),
        "last": torch.zeros(2, dtype=torch.int64),
        "stride": 4,
    }
    assert ops.waveform_conv(**arguments).shape == (2, 9, 16)
    with pytest.raises(InputError, match=message):
        ops.waveform_conv(**{**arguments, **change})
