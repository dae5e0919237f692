"""Strided convolution as products: torch's own, every kernel of a CPU against float64, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.convolution import StridedConv
from gmm_jepa.ops import fused, native, native_blocks
from tests.against_float64 import (
    KERNELS,
    assert_near,
    cotangent,
    needs_native,
    needs_products,
    norm,
    on_kernel,
    on_one_thread_and_two,
    results_of,
)

from .test_memory import peak_bytes

SIZES = {  # B, T, C, C', stride
    "second_stage": (2, 400, 16, 24, 8),
    "odd_stride": (3, 103, 5, 7, 5),
    "frames_behind_the_last_tap": (2, 47, 8, 8, 8),
    "fewest_frames": (1, 8, 4, 6, 8),
    "stride_2": (2, 31, 3, 4, 2),
    "no_rows": (0, 40, 4, 6, 8),
}
# Sizes that fill tiles and panels are the native kernels'; they take a few dozen frames at once.
FILLING = {
    "one frame": (2, 8, 16, 32, 8),
    "one frame of an odd stride": (1, 7, 16, 32, 5),
    "two frames that share all but their ends": (2, 6, 16, 32, 2),
    "as in the second stage": (2, 403, 32, 64, 8),
    "odd numbers": (3, 103, 16, 32, 5),
    "frames behind the last taps": (3, 95, 16, 32, 8),
    "one row": (1, 251, 32, 96, 3),
    "many rows": (40, 17, 16, 32, 4),
    "several blocks": (2, 1201, 32, 32, 5),
    "few channels": (2, 121, 2, 32, 8),
    "one channel": (2, 119, 1, 32, 16),
    "three channels": (2, 229, 3, 64, 16),
    "stride 1": (2, 39, 16, 32, 1),
}
# Of several blocks, and of none that is whole.
EACH = ("several blocks", "odd numbers")


def drawn(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], int]:
    B, T, C, C_out, stride = SIZES[name]
    torch.manual_seed(B + T)
    x, weight = torch.randn(B, T, C, dtype=dtype), torch.randn(C_out, C, 2 * stride, dtype=dtype)
    leaves = [x, weight / (2 * stride) ** 0.5, torch.randn(C_out, dtype=dtype)]
    return [leaf.requires_grad_() for leaf in leaves], stride


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, stride=stride, padding=stride // 2)
    return y.transpose(1, 2)


def with_gradients(form, leaves: list[Tensor], stride: int) -> list[Tensor]:
    out = form(*leaves, stride)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("name", SIZES)
def test_torchs_own_convolution(name):
    leaves, stride = drawn(name)
    ours = with_gradients(ops.strided_conv, leaves, stride)
    for a, b in zip(ours, with_gradients(torch_conv, leaves, stride), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_strided_frames_and_an_expanded_gradient():
    (x, weight, bias), stride = drawn("odd_stride")
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gradients = [
        torch.autograd.grad(form(leaf, weight, bias, stride).sum(), leaf)[0]
        for form, leaf in ((ops.strided_conv, turned), (torch_conv, x))
    ]
    torch.testing.assert_close(*gradients)


def test_autocast_rounds_what_comes_in():
    """Where the native kernels are not asked; the result is float32 on all CPUs."""
    leaves, stride = drawn("second_stage", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), fused.composed():
        out, *gradients = with_gradients(ops.strided_conv, leaves, stride)
    assert all(t.dtype == torch.float32 for t in (out, *gradients))
    wide = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    exact, *of_rounded = with_gradients(ops.strided_conv, wide, stride)
    assert norm(out - exact) < 1e-6 * norm(exact)
    for a, b in zip(gradients, of_rounded, strict=True):
        assert norm(a - b) < 0.01 * norm(b)


def case_of(name: str) -> tuple[list[Tensor], dict]:
    torch.manual_seed(0)
    B, T, C, C_out, stride = FILLING[name]
    weight = torch.randn(C_out, C, 2 * stride) / (2 * stride * C) ** 0.5
    return [torch.randn(B, T, C), weight, torch.randn(C_out)], {"stride": stride}


@pytest.fixture(params=KERNELS)
def kernel(request):
    with on_kernel(request.param, native_blocks, "_is_strided") as name:
        yield name


def exact_of(leaves: list[Tensor], options: dict) -> list[Tensor]:
    return results_of(torch_conv, [leaf.double() for leaf in leaves], options)


@pytest.mark.parametrize("name", FILLING)
def test_float32_against_float64(name, kernel):
    leaves, options = case_of(name)
    got, peer = (results_of(f, leaves, options) for f in (ops.strided_conv, torch_conv))
    assert_near(got, peer, exact_of(leaves, options), factor=2, unit=1e-6)


@pytest.mark.parametrize("name", FILLING)
@needs_native
def test_bfloat16_against_float64(name, kernel):
    """What is multiplied is rounded where there are products of it; else all stays float32."""
    leaves, options = case_of(name)
    rounded = [leaf.bfloat16().float() for leaf in leaves[:2]]
    peer = results_of(torch_conv, [*rounded, leaves[2]], options)
    # Gradients are rounded where they are multiplied, too.
    unit = 2**-9 if native.multiplies_bfloat16() else 1e-6
    got = results_of(ops.strided_conv, leaves, options, True)
    assert_near(got, peer, exact_of(leaves, options), factor=1.2, unit=unit, size=norm)


@pytest.mark.parametrize("name", FILLING)
def test_float64_is_kept(name):
    leaves, options = case_of(name)
    doubles = [leaf.double() for leaf in leaves]
    for autocast in (False, True):
        got = results_of(ops.strided_conv, doubles, options, autocast)
        torch.testing.assert_close(got, exact_of(leaves, options), rtol=1e-10, atol=1e-10)


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
            out = ops.strided_conv(*tensors, **options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
    for a, b in zip(*results, strict=True):
        if kernel == "torch":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", EACH)
def test_frames_of_bfloat16_come_out_as_float32_under_autocast(name, kernel):
    (x, *weights), options = case_of(name)
    x = x.bfloat16()
    expected, got = (
        results_of(ops.strided_conv, [frames, *weights], options, True) for frames in (x.float(), x)
    )
    assert [t.dtype for t in got[:3]] == [torch.float32, torch.bfloat16, torch.float32]
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_frames_without_autocast(dtype):
    leaves, options = case_of("odd numbers")
    leaves = [leaf.to(dtype) for leaf in leaves]
    exact = exact_of(leaves, options)
    for a, e in zip(results_of(ops.strided_conv, leaves, options), exact, strict=True):
        assert a.dtype == dtype
        assert norm(a - e) <= 0.01 * norm(e)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", ["several blocks", "many rows"])
def test_the_same_bits_on_one_thread_and_two(name, autocast):
    leaves, options = case_of(name)
    pairs = on_one_thread_and_two(lambda: results_of(ops.strided_conv, leaves, options, autocast))
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_products
def test_what_is_kept_and_held():
    """Frames and taps; beside the results, taps turned each way."""
    leaves, options = case_of("several blocks")
    leaves, packed = [leaf.requires_grad_() for leaf in leaves], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.data_ptr())
        return t

    turned = leaves[1].nbytes
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = ops.strided_conv(*leaves, **options)
        with torch.no_grad():
            held = peak_bytes(lambda: ops.strided_conv(*leaves, **options))
    assert set(packed) == {t.data_ptr() for t in leaves[:2]}
    assert held <= out.nbytes + turned + 4096
    held = peak_bytes(lambda: torch.autograd.grad(out, leaves, out.detach()))
    assert held <= sum(leaf.nbytes for leaf in leaves) + 2 * turned + 4096


def test_a_bias_of_another_type_is_not_misread():
    """It is refused or converted, not taken by its address."""
    (x, weight, bias), options = case_of("odd numbers")
    try:
        out = ops.strided_conv(x, weight, bias.double(), **options)
    except RuntimeError:
        return
    torch.testing.assert_close(out, torch_conv(x, weight, bias, **options).to(out.dtype))


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [SIZES, FILLING], ids=["torch", "native"])
def test_as_an_op(sizes, narrow):
    if sizes is SIZES:
        leaves, stride = drawn("odd_stride", torch.float32)
    else:
        leaves, options = case_of("odd numbers")
        stride = options["stride"]
    forward, backward = (
        getattr(torch.ops.gmm_jepa, f"strided_conv{end}").default for end in ("", "_backward")
    )
    torch.library.opcheck(forward, (*(leaf.requires_grad_() for leaf in leaves), stride, narrow))
    x, weight, bias = (leaf.detach() for leaf in leaves)
    grad = cotangent(forward(x, weight, bias, stride, narrow))
    torch.library.opcheck(backward, (grad, x, weight, stride, narrow))


@needs_products
def test_which_convolutions_are_products(monkeypatch):
    """Only those under autocast to bfloat16 that fill tiles and stay in cache."""
    calls = []
    op = ops.strided_conv
    monkeypatch.setattr(ops, "strided_conv", lambda *a: calls.append(a[0].shape) or op(*a))

    def takes(B: int = 2, T: int = 100, C: int = 16, C_out: int = 32, **ways: object) -> bool:
        calls.clear()
        native.use_instruction_set(ways.get("set", ""))
        try:
            dtype = ways.get("autocast", torch.bfloat16)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                StridedConv(C, C_out, 8)(torch.randn(B, T, C))
        finally:
            native.use_instruction_set("")
        return len(calls) == 1

    assert takes()
    # Two rows of 512 frames out see as much as may be: 2 x 512 x 16 x 128.
    assert takes(T=512 * 8, C=128)
    assert not takes(T=513 * 8, C=128)
    for others in (
        {"C": 3},
        {"C_out": 33},
        {"B": 0},
        {"autocast": None},
        {"autocast": torch.float16},
        {"set": "portable"},
    ):
        assert not takes(**others), others
    with fused.composed():
        assert not takes()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 40, 4), (6, 4, 15), (6,)), "weight: expected"),
        (((2, 40, 4), (6, 5, 16), (6,)), "weight: expected"),
        (((2, 40, 4), (6, 4, 16), (5,)), "bias: expected"),
        (((2, 7, 4), (6, 4, 16), (6,)), "give none"),
    ],
)
def test_refusals(shapes, words):
    with pytest.raises(InputError, match=words):
        ops.strided_conv(*(torch.zeros(shape) for shape in shapes), 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_on_a_gpu():
    leaves, stride = drawn("second_stage")
    rounded = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    narrow = [leaf.detach().to("cuda", torch.bfloat16).requires_grad_() for leaf in leaves]
    found = with_gradients(ops.strided_conv, narrow, stride)
    expected = with_gradients(ops.strided_conv, rounded, stride)
    for a, b in zip(found, expected, strict=True):
        error = float((a.double().cpu() - b).norm() / b.norm())
        assert error < 0.01
