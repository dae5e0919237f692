"""Residual units, snake and density-adaptive attention: every kernel of a CPU against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import native, native_front_end
from gmm_jepa.ops.density import density_attention_reference
from gmm_jepa.ops.residual import SLOPE, residual_unit_reference

# Names of the native module's instruction sets, and the plain torch form.
KERNELS = [*native.instruction_sets(), "torch"]

# B, T, C, dilation, lengths
UNITS = {
    "one frame": (1, 1, 3, 1, None),
    "fewer frames than taps reach": (2, 7, 5, 125, None),
    "ragged, one row empty": (3, 100, 16, 25, (100, 60, 0)),
    "several blocks": (2, 700, 64, 125, (700, 333)),
    "taps close together": (2, 600, 48, 3, None),
    "channels beyond a panel": (1, 130, 130, 9, (99,)),
    "wide": (2, 40, 256, 1, None),
    "prime sizes": (3, 101, 17, 7, (101, 97, 2)),
    "length one": (2, 20, 32, 1, (1, 20)),
    "block edge": (1, 257, 64, 1, (256,)),
    "no rows": (0, 9, 8, 1, None),
    "no frames": (2, 0, 8, 3, None),
    "large values": (2, 50, 16, 3, (50, 11)),
}
# B, T, C, lengths, scale
SNAKES = {
    "one frame": (1, 1, 16, None, 1.0),
    "prime sizes": (3, 101, 16, (101, 97, 13), 1.0),
    "several blocks": (2, 1030, 48, (1030, 511), 1.0),
    "one row empty": (2, 40, 32, (40, 0), 1.0),
    "block edge": (1, 257, 16, (256,), 1.0),
    "channels that fill no vector": (2, 60, 5, (60, 41), 1.0),
    "quiet": (2, 50, 16, None, 1e-3),
    "loud": (2, 500, 16, (500, 499), 300.0),
    "far beyond float32's sines": (1, 90, 16, None, 1e6),
    "wide": (1, 20, 512, None, 1.0),
    "no rows": (0, 9, 16, None, 1.0),
    "no frames": (2, 0, 16, None, 1.0),
}
# B, T, C, lengths, scale, offset
DENSITIES = {
    "least frames": (2, 8, 16, None, 1.0, 0.0),
    "too few frames": (2, 7, 16, None, 1.0, 0.0),
    "ragged, one row too short": (3, 100, 16, (100, 33, 7), 1.0, 0.0),
    "one row empty": (2, 403, 64, (403, 0), 1.0, 0.0),
    "chunks of unequal size": (1, 11, 32, None, 1.0, 0.0),
    "quiet": (2, 2003, 16, None, 1e-2, 0.0),
    "far from zero": (2, 400, 16, (400, 399), 1.0, 5.0),
    "channels that fill no vector": (2, 60, 5, (60, 41), 1.0, 0.0),
    "beyond the clamp": (1, 4000, 16, None, 1.0, 0.0),
    "prime sizes": (3, 101, 48, (101, 97, 13), 1.0, 0.0),
    "no rows": (0, 9, 16, None, 1.0, 0.0),
    "no frames": (2, 0, 16, None, 1.0, 0.0),
    "minutes": (1, 120_001, 16, None, 1.0, 0.0),
    "one channel group": (4, 64, 16, (64, 64, 9, 8), 1.0, 0.0),
}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_front_end, "_is_float32", lambda *tensors: False)
        monkeypatch.setattr(native_front_end, "_is_density", lambda x: False)
        monkeypatch.setattr(native_front_end, "_is_snake", lambda *tensors: False)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


def real(T: int, lengths: Tensor | None) -> Tensor | float:
    return 1.0 if lengths is None else (torch.arange(T) < lengths[:, None])[..., None].float()


def unit_case(name: str) -> tuple[list[Tensor], dict]:
    """Drawn until no value lies so near the activation's kink that rounding could change sides."""
    B, T, C, dilation, lengths = UNITS[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    scale = 1e4 if name == "large values" else 1.0
    while True:
        x = scale * torch.randn(B, T, C) * real(T, lengths)
        pairs = [(torch.randn(C, C, 3) / (3 * C) ** 0.5, 0.1 * torch.randn(C)) for _ in "12"]
        leaves = [x, *(tensor for pair in pairs for tensor in pair)]
        doubles = [leaf.double() for leaf in leaves]
        hidden = residual_unit_reference(*doubles, lengths, dilation, True, False)[1]
        if not hidden.numel() or hidden.abs().min() > 5e-6 * scale:
            return leaves, {"dilation": dilation, "lengths_frames": lengths}


def snake_case(name: str) -> tuple[list[Tensor], dict]:
    B, T, C, lengths, scale = SNAKES[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    return [scale * torch.randn(B, T, C), 0.1 + 3 * torch.rand(C)], {"lengths_frames": lengths}


def density_case(name: str) -> tuple[list[Tensor], dict]:
    B, T, C, lengths, scale, offset = DENSITIES[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    x = (scale * torch.randn(B, T, C) + offset) * real(T, lengths)
    if name == "beyond the clamp":
        x[:, ::500] *= 40
    squared_widths = torch.rand(4, 4) + 0.3
    return [x, 0.3 * torch.randn(4, 4), squared_widths], {"lengths_frames": lengths}


def results_of(function, leaves: list[Tensor], options: dict) -> list[Tensor]:
    """Output and all gradients under one fixed gradient of the output."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return [out, *(zero if g is None else g for zero, g in zip(zeros, found))]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, e) in enumerate(zip(got, expected, strict=True)):
        if not e.numel():
            continue
        scale, difference = (float(t.detach().abs().max()) for t in (e, a - e))
        assert difference <= tolerance * scale, f"result {number}: {difference} of {scale}"


@pytest.mark.parametrize("name", UNITS)
def test_a_residual_unit(name, kernel):
    torch.manual_seed(0)
    leaves, options = unit_case(name)

    def oracle(x, *parameters, dilation, lengths_frames):
        return residual_unit_reference(x, *parameters, lengths_frames, dilation, False, False)[0]

    expected = results_of(oracle, [leaf.double() for leaf in leaves], options)
    assert_close(results_of(ops.residual_unit, leaves, options), expected, 3e-6)
    with torch.no_grad():
        assert_close([ops.residual_unit(*leaves, **options)], expected[:1], 3e-6)


def by_torch_in_bfloat16(x, weight1, bias1, weight2, bias2, *, dilation, lengths_frames):
    """A residual unit as autocast has it without an op."""
    keep = real(x.shape[1], lengths_frames)

    def convolution(values: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        options = {"padding": dilation, "dilation": dilation}
        return F.conv1d(values.transpose(1, 2), weight, bias, **options).transpose(1, 2)

    y = convolution(F.leaky_relu(x, SLOPE), weight1, bias1, dilation) * keep
    return x + convolution(F.leaky_relu(y, SLOPE), weight2, bias2, 1) * keep


@pytest.mark.parametrize("name", [name for name in UNITS if not name.startswith("no ")])
def test_a_residual_unit_under_autocast(name, kernel):
    torch.manual_seed(0)
    leaves, options = unit_case(name)
    expected = results_of(by_torch_in_bfloat16, [leaf.double() for leaf in leaves], options)
    with torch.autocast("cpu", torch.bfloat16):
        peer = results_of(by_torch_in_bfloat16, leaves, options)
        got = results_of(ops.residual_unit, leaves, options)
        halves = [leaves[0].bfloat16().requires_grad_(), *leaves[1:]]
        assert ops.residual_unit(*halves, **options).dtype == torch.float32
    for number, (a, p, e) in enumerate(zip(got, peer, expected, strict=True)):
        assert a.dtype == torch.float32
        scale, error, of_peer = (float(t.detach().abs().max()) for t in (e, a - e, p - e))
        assert error <= 2 * of_peer + 1e-6 * scale, f"result {number}: {error} beside {of_peer}"


@pytest.mark.parametrize("name", SNAKES)
def test_snake(name, kernel):
    torch.manual_seed(0)
    (x, a), options = snake_case(name)
    # Where a x is thousands of turns, the plain form has lost digits of it, which gradients show.
    turns = SNAKES[name][4] if kernel == "torch" else 1.0
    tolerances = (3e-6, *[3e-6 if turns <= 1 else min(0.5, 2e-6 * turns)] * 2)

    def oracle(x, a, lengths_frames):
        y = x + (a * x).sin().square() / a
        return y if lengths_frames is None else y * real(x.shape[1], lengths_frames)

    expected = results_of(oracle, [x.double(), a.double()], options)
    got = results_of(ops.snake, [x, a], options)
    assert all(t.isfinite().all() for t in got)
    for a, e, tolerance in zip(got, expected, tolerances, strict=True):
        assert_close([a], [e], tolerance)


@pytest.mark.parametrize("name", ["prime sizes", "several blocks", "channels that fill no vector"])
def test_snake_of_bfloat16(name, kernel):
    """Arithmetic is float32's; the gradient of x is rounded once."""
    torch.manual_seed(0)
    (x, a), options = snake_case(name)
    x = x.bfloat16()
    expected = results_of(ops.snake, [x.float(), a], options)
    got = results_of(ops.snake, [x, a], options)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1].bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)


def test_snake_passes_on_what_is_not_finite(kernel):
    x = torch.zeros(1, 2, 16)
    x[0, 0, 3], x[0, 1, 5] = torch.nan, torch.inf
    for values in (x, x.bfloat16()):
        out, d_x, _ = results_of(ops.snake, [values, torch.ones(16)], {})
        assert torch.equal(~out.isfinite(), ~x.isfinite())
        assert torch.equal(d_x.isnan(), ~x.isfinite())


@pytest.mark.parametrize("name", DENSITIES)
def test_density_attention(name, kernel):
    torch.manual_seed(0)
    leaves, options = density_case(name)

    def oracle(*leaves, lengths_frames):
        return density_attention_reference(*leaves, lengths_frames)

    expected = results_of(oracle, [leaf.double() for leaf in leaves], options)
    # The plain form rounds the statistics of two thousand quiet frames more than the native one.
    tolerance = 1e-3 if kernel == "torch" else 1e-4
    assert_close(results_of(ops.density_attention, leaves, options), expected, tolerance)


def test_float64_is_kept():
    leaves, options = unit_case("prime sizes")
    assert ops.residual_unit(*(leaf.double() for leaf in leaves), **options).dtype == torch.float64
    leaves, options = density_case("prime sizes")
    doubles = [leaf.double() for leaf in leaves]
    assert ops.density_attention(*doubles, **options).dtype == torch.float64


@pytest.mark.skipif(not native.instruction_sets(), reason=f"native module: {native.status()}")
@pytest.mark.parametrize("length", [-1, 8])
def test_lengths_beyond_the_frames_are_refused(length):
    lengths = torch.tensor([length])
    convolution = (torch.zeros(16, 16, 3), torch.zeros(16))
    x, gaussians = torch.zeros(1, 7, 16), torch.ones(4, 4)
    with pytest.raises(ValueError, match="lengths_frames"):
        ops.residual_unit(x, *convolution, *convolution, lengths_frames=lengths)
    with pytest.raises(ValueError, match="lengths_frames"):
        ops.density_attention(x, gaussians, gaussians, lengths_frames=lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 7, 16, 1)}, "x: expected"),
        ({"weight1": torch.zeros(16, 16, 5)}, "weight1: expected"),
        ({"bias2": torch.zeros(8)}, "bias2: expected"),
        ({"dilation": 0}, "dilation: expected"),
        ({"dilation": 2**62}, "dilation: expected"),
        ({"lengths_frames": torch.tensor([7, 7])}, "lengths_frames: expected"),
        ({"lengths_frames": torch.tensor([7.0])}, "lengths_frames: expected"),
    ],
)
def test_refusals_of_a_unit(change, message):
    arguments = {"x": torch.zeros(1, 7, 16), "dilation": 1}
    for i in "12":
        arguments |= {f"weight{i}": torch.zeros(16, 16, 3), f"bias{i}": torch.zeros(16)}
    with pytest.raises(InputError, match=message):
        ops.residual_unit(**{**arguments, **change})


def test_refusals_of_snake():
    x = torch.zeros(1, 9, 16)
    with pytest.raises(InputError, match="x: expected"):
        ops.snake(x[0], torch.ones(16))
    with pytest.raises(InputError, match="a: expected"):
        ops.snake(x, torch.ones(8))
    with pytest.raises(InputError, match="lengths_frames: expected"):
        ops.snake(x, torch.ones(16), lengths_frames=torch.tensor([9, 9]))


def test_refusals_of_density_attention():
    x, gaussians = torch.zeros(1, 9, 16), torch.ones(4, 4)
    with pytest.raises(InputError, match="offsets: expected"):
        ops.density_attention(x, torch.ones(4, 3), gaussians)
    with pytest.raises(InputError, match="lengths_frames: expected"):
        ops.density_attention(x, gaussians, gaussians, lengths_frames=torch.tensor([9, 9]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type_changes_nothing(dtype):
    unit, density = unit_case("prime sizes"), density_case("prime sizes")

    def outputs() -> list[Tensor]:
        return [*results_of(ops.residual_unit, *unit), *results_of(ops.density_attention, *density)]

    expected, before = outputs(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        got = [ops.residual_unit(*unit[0], **unit[1])]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs_do_not_depend_on_threads(threads):
    torch.manual_seed(0)
    unit, density = unit_case("several blocks"), density_case("one row empty")
    wave = snake_case("several blocks")
    before = torch.get_num_threads()

    def outputs() -> list[Tensor]:
        # gradients of a unit's weights are summed by thread
        return [
            *results_of(ops.residual_unit, *unit)[:2],
            *results_of(ops.density_attention, *density),
            *results_of(ops.snake, *wave),
        ]

    expected = outputs()
    try:
        torch.set_num_threads(threads)
        got = outputs()
    finally:
        torch.set_num_threads(before)
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["ragged, one row too short", "channels that fill no vector"])
def test_density_attention_with_parameters_of_another_type(name, dtype):
    """Their gradients are of their type, as the description says."""
    (x, *parameters), options = density_case(name)
    lengths = options["lengths_frames"]
    library = torch.ops.gmm_jepa
    leaves = [x.requires_grad_(), *(p.to(dtype).requires_grad_() for p in parameters)]
    torch.library.opcheck(library.density_attention.default, (*leaves, lengths))
    x, *parameters = (leaf.detach() for leaf in leaves)
    arguments = (torch.randn_like(x), x, *parameters, lengths)
    torch.library.opcheck(library.density_attention_backward.default, arguments)
    gradients = library.density_attention_backward(*arguments)
    assert [g.dtype for g in gradients] == [torch.float32, dtype, dtype]


def test_opcheck():
    (x, *parameters), options = unit_case("prime sizes")
    leaves = [leaf.requires_grad_() for leaf in (x, *parameters)]
    for lengths in (None, options["lengths_frames"]):
        arguments = (*leaves, lengths, options["dilation"], True, False)
        torch.library.opcheck(torch.ops.gmm_jepa.residual_unit.default, arguments)
    leaves, options = snake_case("prime sizes")
    for x in (leaves[0], leaves[0].bfloat16()):
        arguments = (x.requires_grad_(), leaves[1].requires_grad_(), options["lengths_frames"])
        torch.library.opcheck(torch.ops.gmm_jepa.snake.default, arguments)
    leaves, options = density_case("prime sizes")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for lengths in (None, options["lengths_frames"]):
        op = torch.ops.gmm_jepa.density_attention.default
        torch.library.opcheck(op, (*leaves, lengths))


@pytest.mark.parametrize("name", ["residual_unit", "density_attention", "snake"])
def test_one_graph_holds_each_with_its_gradients(name):
    makers = {"residual_unit": unit_case, "density_attention": density_case, "snake": snake_case}
    leaves, options = makers[name]("prime sizes")
    op = getattr(ops, name)

    def function(x: Tensor, *parameters: Tensor, **options: object) -> Tensor:
        return 2 * op(torch.sin(x), *parameters, **options).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = results_of(function, leaves, options)
    assert all(t.abs().max() > 0 for t in expected)
    assert_close(results_of(compiled, leaves, options), expected, 1e-5)


def test_snake_of_any_strides_is_dense_as_its_fake_says():
    x = torch.randn(2, 5, 9).transpose(1, 2)
    out = ops.snake(x, torch.ones(5), lengths_frames=torch.tensor([9, 4]))
    assert out.stride() == (45, 5, 1)
