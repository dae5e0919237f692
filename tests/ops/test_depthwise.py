"""Depthwise convolution on CPUs against float64, under autocast, compiled, and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.convolution import DepthwiseConv, FrameConv
from gmm_jepa.ops import native, native_encoder

SIZES = {
    "as_in_the_conformer": (2, 100, 64, 31),
    "one_frame": (2, 1, 24, 31),
    "fewer_frames_than_taps": (2, 17, 40, 31),
    "primes": (3, 131, 37, 7),
    "one_tap": (2, 65, 32, 1),
    "one_channel": (2, 70, 1, 5),
}


def results_of(module: FrameConv, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Output and gradients of x, weight and bias; the cotangent is a bfloat16 one."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaves = (x, module.weight, module.bias)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.fixture(params=[*native.instruction_sets(), "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_encoder, "_is_depthwise", lambda *tensors: False)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", SIZES)
def test_against_float64(name, autocast, kernel):
    """Under autocast float32 on rounded inputs: 16 bits are for what comes in and out."""
    torch.manual_seed(0)
    B, T, C, K = SIZES[name]
    ours, x = DepthwiseConv(C, K), torch.randn(B, T, C).bfloat16().float()
    plain = FrameConv(C, C, K, padding=K // 2, groups=C)
    plain.load_state_dict(ours.state_dict())
    found = results_of(ours, x, autocast=autocast)
    of_plain, exact = results_of(plain, x), results_of(plain.double(), x.double())
    narrow = (0, 1) if autocast else ()  # what comes out, and the gradient of what comes in
    assert found[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for i, (a, p, e) in enumerate(zip(found, of_plain, exact, strict=True)):
        error, of_peer = (float((t - e).abs().max()) for t in (a, p))
        scale = float(e.abs().max())
        assert error <= 2 * of_peer + scale * (2**-8 if i in narrow else 1e-6), i


def test_the_same_bits_on_one_thread_and_two():
    torch.manual_seed(0)
    module, x = DepthwiseConv(48, 31), torch.randn(3, 90, 48)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(results_of(module, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_same_first_parameters():
    modules = []
    for make in (lambda: DepthwiseConv(8, 5), lambda: FrameConv(8, 8, 5, padding=2, groups=8)):
        torch.manual_seed(3)
        modules.append(make().state_dict())
    assert modules[0].keys() == modules[1].keys() == {"weight", "bias"}
    assert all(torch.equal(modules[0][name], modules[1][name]) for name in modules[0])


def test_float64_and_wider_weights():
    x, weight = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(4, 1, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.depthwise_conv(x, weight).dtype == torch.float64
    half = x.bfloat16().requires_grad_()
    weight = weight.float().requires_grad_()
    out = ops.depthwise_conv(half, weight)
    out.float().sum().backward()
    assert (out.dtype, half.grad.dtype, weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


@pytest.mark.parametrize("shape", [(0, 9, 4), (2, 0, 4)])
def test_nothing(shape):
    x, weight, bias = torch.zeros(shape), torch.ones(4, 1, 3), torch.ones(4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = ops.depthwise_conv(*leaves)
    assert out.shape == shape
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_one_graph(backend, autocast):
    torch.manual_seed(0)
    module, x = DepthwiseConv(6, 3), torch.randn(2, 11, 6)
    graphs = []

    def noting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=noting)
    eager, ours = (results_of(form, x, autocast=autocast) for form in (module, compiled))
    torch.testing.assert_close(ours, eager)
    assert "gmm_jepa.depthwise_conv" in graphs[0].code


def test_an_exported_graph_holds_torchs_own_convolution():
    module, x = DepthwiseConv(6, 3).eval(), torch.randn(2, 11, 6)
    program = torch.export.export(module, (x,))
    assert "gmm_jepa" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))


def test_opcheck():
    x, weight = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, 1, 3, requires_grad=True)
    op = torch.ops.gmm_jepa.depthwise_conv.default
    for bias in (None, torch.randn(4, requires_grad=True)):
        torch.library.opcheck(op, (x, weight, bias))
        torch.library.opcheck(op, (x.detach().mT.contiguous().mT, weight[:, 0], bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 4)}, InputError, "x: expected"),
        ({"x": torch.zeros(1, 9, 4).long()}, TypeError, "x: expected a floating-point"),
        ({"weight": torch.zeros(4, 1, 2)}, InputError, "weight: expected"),
        ({"weight": torch.zeros(4, 4, 3)}, InputError, "weight: expected"),
        ({"weight": torch.zeros(())}, InputError, "weight: expected"),
        ({"weight": torch.zeros(4, 3, device="meta")}, InputError, "weight: on meta"),
        ({"bias": torch.zeros(3)}, InputError, "bias: expected"),
        ({"bias": torch.zeros(4).double()}, TypeError, "bias: expected weight's"),
        ({"bias": 0.0}, TypeError, "bias: expected a floating-point"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"x": torch.zeros(1, 9, 4), "weight": torch.zeros(4, 1, 3), "bias": torch.zeros(4)}
    with pytest.raises(error, match=message):
        ops.depthwise_conv(**{**arguments, **change})
