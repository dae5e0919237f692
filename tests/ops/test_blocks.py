"""The operators of a conformer block's parts on CPUs: every kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.attention import GatedRelativeBias
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerBlock
from gmm_jepa.models.heads import ClusterHead
from gmm_jepa.models.padding import FrameMask, frame_mask, zero_padding
from gmm_jepa.models.transformer import GlobalGatedBias, TransformerBlock, TransformerConfig
from gmm_jepa.ops import fused, native, native_blocks

from .test_memory import peak_bytes

# Names of the native module's instruction sets, and the plain torch form.
KERNELS = [*native.instruction_sets(), "torch"]
EPSILON = 1e-5

needs_products = pytest.mark.skipif(
    not native.multiplies_bfloat16(), reason="no products of bfloat16"
)


def feed_forward(x: Tensor, *parameters: Tensor, scale: float = 0.5) -> Tensor:
    return ops.feed_forward(x, *parameters, scale=scale, epsilon=EPSILON)


def feed_forward_in_torch(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, *norm: Tensor, scale
) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], *norm, eps=EPSILON) if norm else x
    return x + scale * F.linear(F.gelu(F.linear(y, up, up_bias)), down, down_bias)


def self_attention(x: Tensor, *weights: Tensor, lengths: Tensor | None) -> Tensor:
    return ops.self_attention(x, ops.AttentionWeights(*weights), lengths_frames=lengths)


def self_attention_in_torch(
    x: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    table: Tensor,
    gate_u: Tensor,
    gate_r: Tensor,
    gate_scale: Tensor,
    *,
    lengths: Tensor | None,
) -> Tensor:
    position = torch.arange(x.shape[1])
    made = F.linear(x, qkv, qkv_bias).unflatten(-1, (3, len(gate_scale), -1))
    q, k, v = made.permute(2, 0, 3, 1, 4)
    u, r = (torch.sigmoid((q * g[:, None]).sum(-1, keepdim=True)) for g in (gate_u, gate_r))
    gate = 1 + u + (1 - u) * r * gate_scale[:, None, None]
    relative = position - position[:, None] + len(position) - 1
    scores = q @ k.mT / q.shape[-1] ** 0.5 + table[:, relative] * gate
    if lengths is not None:
        hidden = position >= lengths.clamp(min=1)[:, None, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return x + F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), out, out_bias)


def convolution_module(x: Tensor, *weights: Tensor, lengths: Tensor | None) -> Tensor:
    named = ops.ConvolutionWeights(*weights)
    return ops.convolution_module(x, named, epsilon=EPSILON, lengths_frames=lengths)


def convolution_module_in_torch(
    x: Tensor,
    norm_in: Tensor,
    norm_in_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    norm_out: Tensor,
    norm_out_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    *,
    lengths: Tensor | None,
) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    real = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.dtype)
    count = (lengths.clamp(min=1) * x.shape[2])[:, None, None]

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = y.to(x.dtype)
        mean = (y * real).sum((1, 2), keepdim=True) / count
        centred = (y - mean) * real
        variance = centred.square().sum((1, 2), keepdim=True) / count
        return centred * (variance + EPSILON).rsqrt() * weight + bias

    y = F.glu(F.linear(norm(x, norm_in, norm_in_bias), up, up_bias), dim=-1) * real
    padding, groups = taps.shape[-1] // 2, len(taps)
    y = F.conv1d(y.mT, taps, taps_bias, padding=padding, groups=groups).mT
    return x + F.linear(F.silu(norm(y, norm_out, norm_out_bias)), down, down_bias) * real


def near_one(*shape: int) -> Tensor:
    return 1 + 0.3 * torch.randn(shape)


def a_map(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n_out, n_in) / n_in**0.5, 0.3 * torch.randn(n_out)


# shape of x, H, whether there is a norm
FEED_FORWARDS = {
    "one frame": ((1, 32), 32, True),
    "a vector": ((32,), 64, False),  # fails in plain torch: flatten(0, -2) of one dimension
    "as in the conformer": ((2, 37, 64), 256, False),
    "as in the head": ((3, 50, 96), 96, True),
    "odd frames": ((5, 13, 32), 160, True),
    "many rows": ((2, 2, 75, 32), 64, True),
    "narrower inside": ((40, 128), 32, True),
    "x that fills no panel": ((3, 11, 24), 96, True),
    "hidden values that fill no panel": ((3, 11, 32), 40, False),
}
# B, T, D, H, lengths
ATTENTIONS = {
    "one frame": (2, 1, 32, 2, None),
    "one row": (1, 20, 64, 1, (17,)),
    "ragged": (4, 33, 64, 4, (33, 1, 17, 32)),
    "a row of no frames": (3, 29, 96, 2, (12, 0, 29)),
    "no frames at all": (2, 9, 32, 1, (0, 0)),
    "many rows": (40, 3, 32, 2, None),
    "more than a tile": (1, 149, 64, 2, None),
    "heads that fill no vector": (2, 15, 32, 4, (15, 6)),
    "a width that fills no panel": (2, 15, 48, 3, (15, 6)),
}
# B, T, D, K, lengths
CONVOLUTIONS = {
    "one frame": (2, 1, 32, 31, None),
    "one row": (1, 41, 64, 15, (40,)),
    "ragged": (4, 65, 64, 31, (65, 1, 17, 64)),
    "a row of no frames": (3, 29, 96, 7, (12, 0, 29)),
    "no frames at all": (2, 9, 32, 3, (0, 0)),
    "many rows": (40, 3, 32, 5, None),
    "one tap": (2, 35, 32, 1, (35, 20)),
    "a row of several blocks": (1, 149, 32, 31, None),
    "a width that fills no panel": (2, 15, 24, 5, (15, 6)),
}


class Case(NamedTuple):
    """An operator, the same in plain torch, and what both take."""

    op: Callable[..., Tensor]
    in_torch: Callable[..., Tensor]
    leaves: list[Tensor]
    options: dict[str, object]


def feed_forward_case(name: str) -> Case:
    shape, H, has_norm = FEED_FORWARDS[name]
    D = shape[-1]
    norm = (near_one(D), torch.randn(D)) if has_norm else ()
    leaves = [torch.randn(shape), *a_map(H, D), *a_map(D, H), *norm]
    return Case(feed_forward, feed_forward_in_torch, leaves, {"scale": 0.5})


def attention_case(name: str) -> Case:
    B, T, D, H, lengths = ATTENTIONS[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    gates = [torch.randn(H, D // H) / 2, torch.randn(H, D // H) / 2, near_one(H)]
    leaves = [*a_map(3 * D, D), *a_map(D, D), torch.randn(H, 2 * T - 1), *gates]
    x = torch.randn(B, T, D)
    return Case(self_attention, self_attention_in_torch, [x, *leaves], {"lengths": lengths})


def convolution_case(name: str) -> Case:
    B, T, D, K, lengths = CONVOLUTIONS[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    taps = (torch.randn(D, 1, K) / K**0.5, torch.randn(D))
    norms = [(near_one(D), torch.randn(D)) for _ in "12"]
    leaves = [*norms[0], *a_map(2 * D, D), *taps, *norms[1], *a_map(D, D)]
    options = {"lengths": lengths}
    x = torch.randn(B, T, D) + 0.5
    return Case(convolution_module, convolution_module_in_torch, [x, *leaves], options)


CASES = {
    **{f"feed-forward, {name}": (feed_forward_case, name) for name in FEED_FORWARDS},
    **{f"self-attention, {name}": (attention_case, name) for name in ATTENTIONS},
    **{f"convolution module, {name}": (convolution_case, name) for name in CONVOLUTIONS},
}
# One of each, of sizes that the native kernels take.
EACH = ("feed-forward, odd frames", "self-attention, ragged", "convolution module, ragged")


def case_of(name: str) -> Case:
    torch.manual_seed(0)
    make, key = CASES[name]
    return make(key)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_blocks, "_fits_maps", lambda *tensors: False)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


def cotangent(out: Tensor) -> Tensor:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return grad.to(out.dtype)


def results_of(
    function: Callable[..., Tensor], leaves: list[Tensor], options: dict, autocast: bool = False
) -> list[Tensor]:
    """Output and all gradients, padding's too, under one fixed gradient of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent(out))]


def exact_of(case: Case) -> list[Tensor]:
    return results_of(case.in_torch, [leaf.double() for leaf in case.leaves], case.options)


def largest(t: Tensor) -> float:
    return float(t.abs().max())


def norm(t: Tensor) -> float:
    return float(t.double().norm())


def assert_near(
    got: list[Tensor],
    peer: list[Tensor],
    exact: list[Tensor],
    *,
    factor: float,
    unit: float,
    size: Callable[[Tensor], float] = largest,
) -> None:
    """At most `factor` times the error of plain torch, and `unit` of the result or of one."""
    for number, (a, p, e) in enumerate(zip(got, peer, exact, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, torch.float32), number
        error, of_peer, scale = size(a - e), size(p - e), max(size(e), size(torch.ones_like(e)))
        assert error <= factor * of_peer + unit * scale, f"{number}: {error}, {of_peer} of {scale}"


def unit_of(name: str) -> float:
    """Probabilities made again as exp(score - log of the sum) are off by units of the score."""
    return 5e-6 if name.startswith("self-attention") else 1e-6


@pytest.mark.parametrize("name", CASES)
def test_float32_against_float64(name, kernel):
    case = case_of(name)
    got, peer = (results_of(f, case.leaves, case.options) for f in (case.op, case.in_torch))
    assert_near(got, peer, exact_of(case), factor=2, unit=unit_of(name))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_against_float64(name, kernel):
    """What is multiplied is rounded where there are products of it; else all stays float32."""
    case = case_of(name)
    got, peer = (results_of(f, case.leaves, case.options, True) for f in (case.op, case.in_torch))
    assert_near(got, peer, exact_of(case), factor=1.2, unit=unit_of(name), size=norm)


@pytest.mark.parametrize("name", CASES)
def test_float64_is_kept(name):
    case = case_of(name)
    leaves = [leaf.double() for leaf in case.leaves]
    for autocast in (False, True):
        got = results_of(case.op, leaves, case.options, autocast)
        torch.testing.assert_close(got, exact_of(case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_strides_change_nothing(name, autocast, kernel):
    """Nor does a gradient that is one number everywhere."""
    case = case_of(name)
    strided = [leaf.repeat_interleave(2, -1)[..., ::2] for leaf in case.leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    results = []
    for leaves in (case.leaves, strided):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = case.op(*leaves, **case.options)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results):
        if kernel == "torch":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_the_same_bits_on_one_thread_and_two(name, autocast):
    case, before = case_of(name), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(results_of(case.op, case.leaves, case.options, autocast))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_what_is_kept_for_a_gradient_changes_nothing(name, autocast, kernel):
    """Nor which gradients are wanted."""
    case = case_of(name)
    expected = results_of(case.op, case.leaves, case.options, autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            out = case.op(*case.leaves, **case.options)
        assert torch.equal(out, expected[0])
        for number, leaf in enumerate(case.leaves):
            leaves = list(case.leaves)
            leaves[number] = leaf.detach().requires_grad_()
            out = case.op(*leaves, **case.options)
            with torch.autocast("cpu", enabled=False):
                (found,) = torch.autograd.grad(out, leaves[number], cotangent(out))
            assert torch.equal(found, expected[number + 1]), number


@pytest.mark.parametrize("name", EACH)
def test_gradients_inside_of_autocast_are_those_outside(name, kernel):
    case = case_of(name)
    _, *expected = results_of(case.op, case.leaves, case.options, True)
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    with torch.autocast("cpu", torch.bfloat16):
        out = case.op(*leaves, **case.options)
        found = torch.autograd.grad(out, leaves, cotangent(out))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", EACH)
def test_frames_of_bfloat16_come_out_as_float32_under_autocast(name, kernel):
    case = case_of(name)
    x = case.leaves[0].bfloat16()
    expected, got = (
        results_of(case.op, [frames, *case.leaves[1:]], case.options, True)
        for frames in (x.float(), x)
    )
    assert [t.dtype for t in got[:3]] == [torch.float32, torch.bfloat16, torch.float32]
    expected[1] = expected[1].bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_convolution_module_does_not_see_padding(autocast, kernel):
    case = case_of("convolution module, ragged")
    (x, *weights), lengths = case.leaves, case.options["lengths"]
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    others = torch.where(padding[..., None], 1e3 * torch.randn(x.shape), x)
    first, second = (
        results_of(case.op, [frames, *weights], case.options, autocast) for frames in (x, others)
    )
    assert torch.equal(second[0][padding], others[padding])
    assert torch.equal(second[1][padding], cotangent(x)[padding])
    assert torch.equal(first[0][~padding], second[0][~padding])
    for a, b in zip(first[1:], second[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_self_attention_does_not_look_at_padding(autocast, kernel):
    """Real frames come out the same whatever padding holds."""
    case = case_of("self-attention, ragged")
    (x, *weights), lengths = case.leaves, case.options["lengths"]
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    others = torch.where(padding[..., None], 10 * torch.randn(x.shape), x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        first, second = (case.op(frames, *weights, lengths=lengths) for frames in (x, others))
    assert torch.equal(first[~padding], second[~padding])


def _constant_frames(x: Tensor) -> Tensor:
    return torch.full_like(x, -1.0)


def _one_huge_frame(x: Tensor) -> Tensor:
    x = x.clone()
    x.flatten(0, -2)[-1] *= 1e30
    return x


def _all_huge(x: Tensor) -> Tensor:
    return 1e30 * x


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in EACH for change in (_constant_frames, _one_huge_frame)),
        ("feed-forward, as in the conformer", _all_huge),  # norms of frames overflow
        ("convolution module, ragged", _all_huge),
    ],
)
def test_extreme_frames(name, change, autocast, kernel):
    """What is finite in plain torch is finite; of frames without variance it is near, too."""
    case = case_of(name)
    leaves = [change(case.leaves[0]), *case.leaves[1:]]
    peer = results_of(case.in_torch, leaves, case.options)
    got = results_of(case.op, leaves, case.options, autocast)
    assert peer[0].isfinite().any()
    for number, (a, p) in enumerate(zip(got, peer, strict=True)):
        assert a[p.isfinite()].isfinite().all(), number
    if change is _constant_frames and not autocast:
        exact = results_of(case.in_torch, [leaf.double() for leaf in leaves], case.options)
        assert_near(got, peer, exact, factor=2, unit=unit_of(name))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_no_rows(name, autocast, kernel):
    case = case_of(name)
    x, *weights = case.leaves
    options = {k: v[:0] if isinstance(v, Tensor) else v for k, v in case.options.items()}
    out, d_x, *gradients = results_of(case.op, [x[:0], *weights], options, autocast)
    assert out.shape == d_x.shape == x[:0].shape
    assert all((g == 0).all() for g in gradients)


def test_a_feed_forward_of_no_frames(kernel):
    x, *weights = case_of("feed-forward, odd frames").leaves
    out, _, *gradients = results_of(feed_forward, [x[:, :0], *weights], {})
    assert out.shape == (5, 0, 32)
    assert all((g == 0).all() for g in gradients)


@needs_products
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # bytes a frame of x's width D, beside x itself
        ("feed-forward, as in the conformer", 2 * 4),  # hidden values, bfloat16
        ("self-attention, more than a tile", 4 * 4.2),  # q, k, v, the attention's output, gates
        ("convolution module, a row of several blocks", 2 * 2 + 4),  # values, gates, taps
    ],
)
def test_what_is_kept_and_held(name, kept):
    case = case_of(name)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    x, packed = leaves[0], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = case.op(*leaves, **case.options)
        given = {leaf.data_ptr() for leaf in leaves}
        saved = sum(t.nbytes for t in packed if t.data_ptr() not in given)
        assert saved <= kept * x.numel() + 16 * len(x)
        with torch.no_grad():
            held = peak_bytes(lambda: case.op(*leaves, **case.options))
    assert held <= saved + out.nbytes
    gradients = sum(leaf.nbytes for leaf in leaves)
    held = peak_bytes(lambda: torch.autograd.grad(out, leaves, out.detach()))
    assert held <= gradients + 4096


# Behind the tensors, without `narrow`: of the operator and of its gradient.
OPTIONS = {
    "feed_forward": ((0.5, EPSILON, True), (0.5, EPSILON)),
    "self_attention": ((), ()),
    "convolution_module": ((EPSILON,), ()),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", EACH)
def test_opcheck(name, narrow):
    """With and without what may be left out: norm or lengths."""
    case, op = case_of(name), name.split(",")[0].replace("-", "_").replace(" ", "_")
    forward, backward = (getattr(torch.ops.gmm_jepa, op + end).default for end in ("", "_backward"))
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    if op == "feed_forward":
        variants = (leaves, [*leaves[:5], None, None])
    else:
        variants = ([*leaves, case.options["lengths"]], [*leaves, None])
    for tensors in variants:
        torch.library.opcheck(forward, (*tensors, *OPTIONS[op][0], narrow))
        x, *rest = (None if t is None else t.detach() for t in tensors)
        out, *kept = forward(x, *rest, *OPTIONS[op][0], narrow)
        arguments = (cotangent(out), x, *kept, *rest, *OPTIONS[op][1], narrow)
        torch.library.opcheck(backward, arguments)


PARAMETERS = {
    EACH[0]: ("up_weight", "up_bias", "down_weight", "down_bias", "norm_weight", "norm_bias"),
    EACH[1]: ops.AttentionWeights._fields,
    EACH[2]: ops.ConvolutionWeights._fields,
}
# Of which another size changes what is expected of others.
OTHERS = {"up_bias": "up_weight", "gate_scale": "table", "taps": "taps"}


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[..., None]])
@pytest.mark.parametrize("name", EACH)
def test_parameters_that_do_not_fit(name, change):
    case = case_of(name)
    for number, parameter in enumerate(PARAMETERS[name], start=1):
        leaves = list(case.leaves)
        leaves[number] = change(leaves[number])
        with pytest.raises(InputError, match=f"^({parameter}|{OTHERS.get(parameter)}): expected"):
            case.op(*leaves, **case.options)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        (EACH[0], torch.zeros(()), "up_weight: expected"),
        (EACH[0], torch.zeros(7, 31), "up_weight: expected"),
        (EACH[1], torch.zeros(4, 64), "x: expected"),
        (EACH[1], torch.zeros(4, 0, 64), "x: expected"),
        (EACH[1], torch.zeros(3, 33, 64), "lengths_frames: expected"),
        (EACH[2], torch.zeros(4, 64), "x: expected"),
        (EACH[2], torch.zeros(4, 0, 64), "x: expected"),
        (EACH[2], torch.zeros(3, 65, 64), "lengths_frames: expected"),
    ],
)
def test_frames_that_do_not_fit(name, x, message):
    case = case_of(name)
    with pytest.raises(InputError, match=message):
        case.op(x, *case.leaves[1:], **case.options)


def test_an_even_number_of_taps_and_half_a_norm():
    x, *tensors, norm_bias = case_of(EACH[0]).leaves
    with pytest.raises(InputError, match="norm_bias: expected"):
        ops.feed_forward(x, *tensors)
    with pytest.raises(InputError, match="norm_weight: expected"):
        ops.feed_forward(x, *tensors[:4], None, norm_bias)
    case = case_of(EACH[2])
    case.leaves[5] = case.leaves[5][..., 1:]
    with pytest.raises(InputError, match="taps: expected an odd"):
        case.op(*case.leaves, **case.options)


@pytest.mark.skipif(not native.instruction_sets(), reason=f"native module: {native.status()}")
@pytest.mark.parametrize("length", [-1, 10])
@pytest.mark.parametrize("name", ["self-attention", "convolution module"])
def test_lengths_beyond_the_frames_are_refused(name, length):
    case = case_of(f"{name}, no frames at all")
    with pytest.raises(ValueError, match="lengths_frames"):
        case.op(*case.leaves, lengths=torch.tensor([9, length]))
    with pytest.raises(InputError, match="lengths_frames: expected integers"):
        case.op(*case.leaves, lengths=torch.tensor([9.0, 9.0]))


class Biased(nn.Module):
    """A block with the position bias that its encoder would hand in."""

    def __init__(self, block: nn.Module, bias: nn.Module | None) -> None:
        super().__init__()
        self.block, self.bias = block, bias

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        if self.bias is None:
            return self.block(x)
        return self.block(x, mask, self.bias, self.bias.table(x.shape[1]))


POSITIONS = {"n_buckets": 16, "max_distance": 40}


def model_of(name: str, *, dropout: float = 0.0, dim: int = 64) -> Biased:
    torch.manual_seed(0)
    sizes = {"code_dim": dim, "heads": 2, "dropout": dropout}
    if name == "cluster head":
        return Biased(ClusterHead(dim, 50, dropout), None)
    if name == "transformer block":
        block = TransformerBlock(TransformerConfig(ffn_dim=96, **sizes))
        return Biased(block, GlobalGatedBias(2, dim // 2, **POSITIONS))
    block = ConformerBlock(ConformerConfig(conv_kernel=7, **sizes))
    return Biased(block, GatedRelativeBias(2, dim // 2, **POSITIONS))


# Calls of feed_forward, self_attention and convolution_module.
MODELS = {"conformer block": (2, 1, 1), "cluster head": (3, 0, 0), "transformer block": (1, 0, 0)}


def frames_of(model: Biased, has_mask: bool) -> tuple[Tensor, FrameMask | None]:
    dim = next(p.shape[-1] for p in model.parameters() if p.ndim == 2)
    mask = frame_mask(torch.tensor([21, 0, 13]), 21) if has_mask else None
    return zero_padding(torch.randn(3, 21, dim), mask), mask


@pytest.fixture
def calls(monkeypatch) -> Callable[[], tuple[int, ...]]:
    """How often each of the three operators was called."""
    counts = {"feed_forward": 0, "self_attention": 0, "convolution_module": 0}
    for name in counts:
        op = getattr(ops, name)

        def counting(*arguments, name=name, op=op, **options):
            counts[name] += 1
            return op(*arguments, **options)

        monkeypatch.setattr(ops, name, counting)
    return lambda: tuple(counts.values())


def results_of_model(
    model: nn.Module, x: Tensor, mask: FrameMask | None, autocast: bool = True
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(leaves[0], mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent(out))]


@needs_products
@pytest.mark.parametrize("has_mask", [False, True], ids=["whole", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_as_plain_torch(name, has_mask, calls):
    """To the model in float64; padding of a block comes out as zeros."""
    model = model_of(name)
    x, mask = frames_of(model, has_mask)
    got = results_of_model(model, x, mask)
    assert calls() == MODELS[name]
    with fused.composed():
        peer = results_of_model(model, x, mask)
    assert calls() == MODELS[name]
    exact = results_of_model(model.double(), x.double(), mask, autocast=False)
    assert [t.dtype for t in got] == [t.dtype for t in peer]
    if has_mask and name != "cluster head":
        assert (got[0][mask.keep.expand_as(got[0]) == 0] == 0).all()
    got = [t.float() for t in got]  # a head's logits are bfloat16
    assert_near(got, peer, exact, factor=2, unit=1e-6, size=norm)


@needs_products
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "why", ["dropout", "float32", "float16", "float64", "width", "instruction set", "narrow frames"]
)
def test_models_that_do_not_take_the_operators(name, why, calls):
    model = model_of(name, dropout=0.1, dim=24 if why == "width" else 64)
    x, mask = frames_of(model, True)
    model.train(why == "dropout")
    if why == "float64":
        model, x = model.double(), x.double()
    if why == "narrow frames":
        x = x.bfloat16()
        if name == "cluster head":  # which widens its own
            model = model.block.blocks[0]
            model, x = (lambda block: lambda x, _: block(x))(model), x.repeat(1, 1, 2)
    narrow = torch.float16 if why == "float16" else torch.bfloat16
    native.use_instruction_set("portable" if why == "instruction set" else "")
    try:
        with torch.autocast("cpu", narrow, enabled=why != "float32"):
            model(x, mask)
    finally:
        native.use_instruction_set("")
    assert calls() == (0, 0, 0)


@needs_products
def test_training_without_dropout_takes_them(calls):
    model = model_of("conformer block").train()
    with torch.autocast("cpu", torch.bfloat16):
        model(*frames_of(model, True))
    assert calls() == MODELS["conformer block"]


@needs_products
def test_one_graph_holds_a_conformer_block():
    model, graphs = model_of("conformer block").eval(), []
    x, mask = frames_of(model, True)

    def noting(graph, inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=noting)
    eager, ours = (results_of_model(form, x, mask) for form in (model, compiled))
    found = [graphs[0].count(f"gmm_jepa.{name}.") for name in OPTIONS]
    assert found == list(MODELS["conformer block"])
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * float(e.abs().max()))
