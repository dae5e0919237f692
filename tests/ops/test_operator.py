"""The short way past the dispatcher: as the long one wherever it is taken, and where it is not."""

from __future__ import annotations

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

from gmm_jepa.ops.operator import Operator
from tests.scaled_map import (
    NAME,
    WAYS,
    leaves_of,
    scaled_map,
    scaled_map_backward,
    scaled_map_reference,
)

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
