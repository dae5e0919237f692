"""The short way past the dispatcher: as the long one wherever it is taken, and where it is not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gmm_jepa.ops.attention import _attention
from gmm_jepa.ops.convolution_module import _convolution_module
from gmm_jepa.ops.density import _density_attention
from gmm_jepa.ops.depthwise import _depthwise
from gmm_jepa.ops.dropout import _dropout
from gmm_jepa.ops.em import _em_statistics, _kmeans_assign, _kmeans_statistics
from gmm_jepa.ops.feed_forward import _feed_forward
from gmm_jepa.ops.linear import _linear
from gmm_jepa.ops.log_mel import _log_mel
from gmm_jepa.ops.operator import Operator
from gmm_jepa.ops.posterior import _log_likelihood, _posterior, _topk
from gmm_jepa.ops.residual import _unit
from gmm_jepa.ops.residual_block import _block
from gmm_jepa.ops.self_attention import _self_attention
from gmm_jepa.ops.snake import _snake, _snake_narrow
from gmm_jepa.ops.strided import _strided
from gmm_jepa.ops.waveform import _waveform_conv

NAME = "gmm_jepa_tests::scaled_map"


def scaled_map_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Scale (x^2 weight + bias), and x^2."""
    square = x.square()
    y = scale * square @ weight
    return (y if bias is None else y + scale * bias), square


def scaled_map_backward_reference(
    grad: Tensor, x: Tensor, square: Tensor, weight: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return 2 * scale * x * (grad @ weight.T), scale * square.T @ grad, scale * grad.sum(0)


scaled_map = Operator(NAME, scaled_map_reference)
scaled_map_backward = Operator(f"{NAME}_backward", scaled_map_backward_reference)
scaled_map.register_kernel("cpu")(scaled_map_reference)
scaled_map_backward.register_kernel("cpu")(scaled_map_backward_reference)


@scaled_map.register_fake
def _(x, weight, bias, scale):
    return x.new_empty(len(x), weight.shape[1]), torch.empty_like(x)


@scaled_map_backward.register_fake
def _(grad, x, square, weight, scale):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[1])


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.scale = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    d_x, d_weight, d_bias = scaled_map_backward(grad, *ctx.saved_tensors, ctx.scale)
    return d_x, d_weight, d_bias if ctx.has_bias else None, None


scaled_map.register_autograd(_vjp, setup_context=_setup)
scaled_map.register_autocast("cpu", torch.float32)


def leaves_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((5, 4), (4, 3), (3,))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


FRAMES, WEIGHT, BIAS = (leaf.detach() for leaf in leaves_of())


def output(x: Tensor) -> Tensor:
    return scaled_map(x, WEIGHT, BIAS, 0.5)[0]


class Long:
    """An operator's long way, counted: the dispatcher alone."""

    def __init__(self, op: Operator) -> None:
        self._op, self.calls = op._op, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self._op(*arguments)


@pytest.fixture
def long(monkeypatch) -> Long:
    """Where `scaled_map` goes when it does not take the short way."""
    counting = Long(scaled_map)
    monkeypatch.setattr(scaled_map, "_op", counting)
    return counting


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _frozen(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [leaf.detach() for leaf in _draw(*shapes)]


def _of_convolution_module() -> list:
    shapes = ((32,), (32,), (64, 32), (64,), (32, 1, 5), (32,), (32,), (32,), (32, 32), (32,))
    return [*_draw((2, 9, 32), *shapes), torch.tensor([9, 4]), torch.tensor([3]), 1e-5, 0.2, False]


def _of_self_attention() -> list:
    shapes = ((96, 32), (96,), (32, 32), (32,), (2, 17), (2, 16), (2, 16), (2,))
    return [*_draw((2, 9, 32), *shapes), torch.tensor([9, 4]), torch.tensor([3]), 0.2, False]


def _of_unit() -> list:
    tensors = _draw((2, 9, 16), (16, 16, 3), (16,), (16, 16, 3), (16,))
    return [*tensors, torch.tensor([9, 4]), 3, True, False]


OPERATORS: dict[str, tuple[Operator, Callable[[], list]]] = {
    "of these tests": (scaled_map, lambda: [*leaves_of(), 0.5]),
    "without an optional tensor": (scaled_map, lambda: [*leaves_of()[:2], None, 0.5]),
    "attention": (
        _attention,
        lambda: [*_draw(*[(2, 2, 9, 16)] * 3, (2, 17), (2, 2, 9)), None, None, 0.0],
    ),
    "convolution module": (_convolution_module, _of_convolution_module),
    "density attention": (
        _density_attention,
        lambda: [*_draw((2, 20, 16), (4, 4)), torch.ones(4, 4, requires_grad=True), None],
    ),
    "depthwise": (_depthwise, lambda: _draw((2, 9, 16), (16, 1, 3), (16,))),
    "feed-forward": (
        _feed_forward,
        lambda: [
            *_draw((2, 9, 32), (64, 32), (64,), (32, 64), (32,), (32,), (32,)),
            *(torch.tensor([3]), 0.5, 1e-5, 0.2, True, False),
        ],
    ),
    "linear": (_linear, lambda: _draw((18, 16), (8, 16), (8,))),
    "residual unit": (_unit, _of_unit),
    "self-attention": (_self_attention, _of_self_attention),
    "snake": (_snake, lambda: [*_draw((2, 9, 16), (16,)), torch.tensor([9, 4])]),
}
# Of the mixture's, of K = 4, D = 16: parameters have no gradient.
MIXTURE = (torch.zeros(4), torch.randn(4, 16, generator=torch.Generator().manual_seed(2)))
MIXTURE = (*MIXTURE, torch.ones(4, 16))
OPERATORS |= {
    "dropout": (_dropout, lambda: [*_draw((9, 16)), torch.tensor([3]), 0.2]),
    "EM": (_em_statistics, lambda: [*_frozen((9, 16)), *MIXTURE]),
    "k-means": (_kmeans_statistics, lambda: [*_frozen((9, 16)), MIXTURE[1]]),
    "log-likelihood": (_log_likelihood, lambda: [*_draw((9, 16)), *MIXTURE, "exact"]),
    "log-mel": (
        _log_mel,
        lambda: [
            *_draw((2, 900)),
            *(torch.tensor([900, 400]), torch.hann_window(400), torch.rand(201, 8) + 0.1),
            *(160, 1e-6, torch.float32),
        ],
    ),
    "nearest centroids": (_kmeans_assign, lambda: [*_frozen((9, 16)), MIXTURE[1]]),
    "posterior": (
        _posterior,
        lambda: [*_draw((9, 16)), *MIXTURE, 1.0, False, "fast", torch.float32],
    ),
    "posterior, logarithm": (
        _posterior,
        lambda: [*_draw((9, 16)), *MIXTURE, 1.0, True, "fast", torch.float32],
    ),
    "residual units": (
        _block,
        lambda: [
            *_draw((2, 9, 16), (2, 16, 16, 3), (2, 16), (2, 16, 16, 3), (2, 16)),
            *(torch.tensor([9, 4]), [1, 3], False),
        ],
    ),
    "snake of 16 bits": (_snake_narrow, lambda: [*_draw((2, 9, 16), (16,)), None]),
    "strided": (_strided, lambda: [*_draw((2, 12, 16), (32, 16, 4), (32,)), 2, False]),
    "topk": (_topk, lambda: [*_frozen((9, 16)), *MIXTURE, 2, 1.0]),
    "waveform": (
        _waveform_conv,
        lambda: [*_draw((2, 40), (16, 8), (16,), (2, 2, 16)), torch.tensor([4, 2]), 4],
    ),
}
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_short_way_is_as_the_long_one(name, way):
    op, make = OPERATORS[name]
    results = []
    for call in (op, op._op):
        arguments = make()
        with WAYS[way]():
            out = call(*arguments)
        out = (out,) if isinstance(out, Tensor) else out
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        grads = ()
        if out[0].requires_grad:
            cotangent = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(out[0], leaves, cotangent.to(out[0].dtype))
        assert (len(grads) == len(leaves)) == (not leaves or way in ("plain", "autocast"))
        flags = [(t.requires_grad, t.is_leaf, t.is_inference(), t.stride()) for t in out]
        results.append((flags, [*out, *grads]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_no_bit_of_float32(name):
    """Nor reaches into the plain torch that a kernel may fall back on."""
    op, make = OPERATORS[name]
    expected = op(*make())
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*make())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_all_operators_are_tried():
    modules = [m for name, m in sys.modules.items() if name.startswith("gmm_jepa.ops.")]
    found = {o for m in modules for o in vars(m).values() if isinstance(o, Operator)}
    tried = {op for op, _ in OPERATORS.values()}
    assert {op._name for op in found - tried if not op._name.endswith("_backward")} == set()


@pytest.mark.parametrize("way", WAYS)
def test_it_is_taken(way, long):
    with WAYS[way]():
        scaled_map(*leaves_of(), 0.5)
        scaled_map(*(nn.Parameter(leaf) for leaf in leaves_of()), 0.5)
    assert long.calls == 0


@pytest.mark.parametrize("call", [scaled_map, scaled_map._op], ids=["short", "long"])
def test_autocast_casts_all_but_float64(call):
    x, weight, bias = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves_of())
    doubles = leaves_of(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y, square = call(x, weight.detach().float(), bias, 0.5)
        assert call(*doubles, 0.5)[0].dtype == torch.float64
    assert (y.dtype, square.dtype) == (torch.float32, torch.float32)
    assert torch.equal(square, x.float().square())
    d_x, d_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert (d_x.dtype, d_bias.dtype) == (torch.bfloat16, torch.bfloat16)


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.append(str(function))
        return function(*arguments, **(options or {}))


class NotingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.seen.append(str(function))
        return function(*arguments, **(options or {}))


# Fails of functions: such a mode sees what the kernel does, not the operator.
@pytest.mark.parametrize("mode", [Noting, NotingFunctions])
def test_a_mode_sees_the_operator(mode):
    with mode() as seeing:
        scaled_map(*leaves_of(), 0.5)
    assert "gmm_jepa_tests.scaled_map.default" in seeing.seen


def test_flops_are_counted(long):
    with FlopCounterMode(display=False) as counter:
        y, _ = scaled_map(*leaves_of(), 0.5)
        y.sum().backward()
    assert long.calls == 1
    with FlopCounterMode(display=False) as expected:
        y, _ = long(*leaves_of(), 0.5)
        y.sum().backward()
    assert counter.get_total_flops() == expected.get_total_flops()


def test_the_profiler_has_its_names():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y, _ = scaled_map(*leaves_of(), 0.5)
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {NAME, f"{NAME}_backward"} <= names


class Marked(Tensor):
    """Gives its class to whatever is made of it."""


def test_subclasses_keep_their_class(long):
    x, weight, bias = leaves_of()
    y, square = scaled_map(x.detach().as_subclass(Marked), weight, bias, 0.5)
    assert long.calls == 1
    assert type(y) is type(square) is Marked


def test_a_sign_that_is_not_in_memory_counts(monkeypatch):
    """The dispatcher writes such tensors out; a kernel would take them by their address."""
    negative = torch._neg_view(FRAMES)
    addressed = []
    kernel = scaled_map._kernel
    monkeypatch.setattr(
        scaled_map, "_kernel", lambda *a: addressed.append(a[0].is_neg()) or kernel(*a)
    )
    y, _ = scaled_map(negative, WEIGHT, BIAS, 0.5)
    torch.testing.assert_close(y, output(-FRAMES))
    assert not any(addressed)


def test_zeros_without_memory(long):
    y, square = scaled_map(torch._efficientzerotensor((5, 4)), WEIGHT, BIAS, 0.5)
    assert long.calls == 1
    torch.testing.assert_close(y, output(torch.zeros(5, 4)))
    assert not square.any()


def test_other_devices(long):
    y, _ = scaled_map(*(leaf.to("meta") for leaf in leaves_of()), 0.5)
    assert long.calls == 1
    assert y.device.type == "meta"
    assert y.shape == (5, 3)


def test_fake_tensors():
    mode = torch._subclasses.FakeTensorMode()
    leaves = [mode.from_tensor(leaf) for leaf in leaves_of()]
    y, _ = scaled_map(*leaves, 0.5)
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (5, 3)


TRACERS: dict[str, Callable[[Callable, Tensor], Callable]] = {
    "fx": lambda f, x: torch.fx.symbolic_trace(f),
    "jit": lambda f, x: torch.jit.trace(f, (x,)),
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx before dispatch": lambda f, x: make_fx(f, pre_dispatch=True)(x),
    "make_fx, fake": lambda f, x: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager"),
}


@pytest.fixture
def opaque(monkeypatch) -> None:
    """The short way leads to a kernel that no tracer sees into, as a native one is."""

    def kernel(*arguments):
        plain = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
        return tuple(torch.from_numpy(t.numpy().copy()) for t in scaled_map_reference(*plain))

    monkeypatch.setattr(scaled_map, "_kernel", kernel)


# Fails of fx, of jit and of make_fx before dispatch: the short way is taken.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_trace_is_of_the_operator(tracer, opaque):
    """Not of what its kernel found."""
    traced = TRACERS[tracer](output, FRAMES)
    assert "scaled_map" in str(getattr(traced, "graph", "scaled_map"))
    for x in (FRAMES, FRAMES + 1):
        torch.testing.assert_close(traced(x), output(x))


TRANSFORMS: dict[str, Callable[[Callable, Tensor], object]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(5, 3))[0],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jvp with gradients": lambda f, x: torch.func.jvp(f, (x.clone().requires_grad_(),), (x,)),
}


def outcome(run: Callable[[], object]) -> object:
    """What comes of it, or the type of what is raised."""
    try:
        return run()
    except (RuntimeError, NotImplementedError) as error:
        return type(error)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_the_dispatchers(name, long):
    found = outcome(lambda: TRANSFORMS[name](output, FRAMES))
    assert long.calls > 0
    expected = outcome(lambda: TRANSFORMS[name](lambda x: long(x, WEIGHT, BIAS, 0.5)[0], FRAMES))
    if isinstance(expected, type):
        assert found is expected
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_the_dispatchers(requires_grad, opaque):
    """Which raises where a gradient is wanted, and else knows no tangents of custom operators."""
    found = []
    for call in (scaled_map, scaled_map._op):
        x, weight, bias = (leaf.detach().requires_grad_(requires_grad) for leaf in leaves_of())
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))

            def tangent(call=call, arguments=(dual, weight, bias, 0.5)):
                return forward_ad.unpack_dual(call(*arguments)[0]).tangent

            found.append(outcome(tangent))
    assert found[0] is found[1] is (NotImplementedError if requires_grad else None)


def test_second_gradients_raise():
    x, weight, bias = leaves_of()
    y, _ = scaled_map(x, weight, bias, 0.5)
    (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(d_x.sum(), x)
    doubles = leaves_of(torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: scaled_map(*leaves, 0.5)[0], doubles)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.gradgradcheck(lambda *leaves: scaled_map(*leaves, 0.5)[0], doubles)


def test_an_operator_without_a_gradient_raises_as_the_dispatchers():
    x, weight, _ = leaves_of()
    d_x, *_ = scaled_map_backward(torch.ones(5, 3), x, x.detach().square(), weight, 0.5)
    assert d_x.requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        d_x.sum().backward()


def test_hooks_of_saved_tensors(long):
    x, weight, bias = leaves_of()
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t + 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t - 1):
        y, square = scaled_map(x, weight, bias, 0.5)
    assert [t.data_ptr() for t in packed] == [t.data_ptr() for t in (x, square, weight)]
    found = torch.autograd.grad(y.sum(), (x, weight, bias))
    expected = torch.autograd.grad(scaled_map(x, weight, bias, 0.5)[0].sum(), (x, weight, bias))
    torch.testing.assert_close(found, expected)
    assert long.calls == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant, long):
    x, weight, bias = leaves_of()

    def function(x: Tensor) -> Tensor:
        return scaled_map(x.sin(), weight, bias, 0.5)[0].cos()

    expected = torch.autograd.grad(function(x).sum(), x)[0]
    checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)
    assert weight.grad is not None
    assert long.calls == 0


def test_a_saved_tensor_changed_in_place_is_noticed():
    for place in range(3):
        x, weight, bias = leaves_of()
        own = [x.clone(), weight.clone()]
        y, square = scaled_map(*own, bias, 0.5)
        with torch.no_grad():
            (*own, square)[place].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_graph_is_kept_or_freed():
    x, weight, bias = leaves_of()
    y, square = scaled_map(x, weight, bias, 0.5)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in "12")
    assert torch.equal(first, second)
    assert torch.autograd.grad(square.sum(), x, retain_graph=True, allow_unused=True) == (None,)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_an_operator_without_a_kernel_of_cpus_goes_the_long_way(monkeypatch):
    counting = Long(scaled_map)
    monkeypatch.setattr(scaled_map, "_op", counting)
    monkeypatch.setattr(scaled_map, "_kernel", None)
    scaled_map(*leaves_of(), 0.5)
    assert counting.calls == 1
