"""The operators of a conformer block's parts on CPUs: every kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.ops import native, native_blocks

from .test_memory import peak_bytes

# Names of the native module's instruction sets, and the plain torch form.
KERNELS = [*native.instruction_sets(), "torch"]
EPSILON = 1e-5


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
    "a vector": ((32,), 64, False),
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


def results_of(function: Callable[..., Tensor], leaves: list[Tensor], options: dict) -> list:
    """Output and all gradients, padding's too, under one fixed gradient of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent(out))]


def exact_of(case: Case) -> list[Tensor]:
    return results_of(case.in_torch, [leaf.double() for leaf in case.leaves], case.options)


def assert_near(got: list, peer: list, exact: list, *, factor: float, unit: float) -> None:
    """At most `factor` times the error of plain torch, and `unit` of the largest value."""
    for number, (a, p, e) in enumerate(zip(got, peer, exact, strict=True)):
        assert a.shape == e.shape, number
        assert a.dtype == torch.float32, number
        if not e.numel():
            continue
        scale = max(1.0, float(e.abs().max()))
        error, of_peer = (float((t - e).abs().max()) for t in (a, p))
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
    with torch.autocast("cpu", torch.bfloat16):
        peer = results_of(case.in_torch, case.leaves, case.options)
        got = results_of(case.op, case.leaves, case.options)
    assert_near(got, peer, exact_of(case), factor=1.5, unit=unit_of(name))


@pytest.mark.parametrize("name", CASES)
def test_float64_is_kept(name):
    case = case_of(name)
    leaves = [leaf.double() for leaf in case.leaves]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = results_of(case.op, leaves, case.options)
        torch.testing.assert_close(got, exact_of(case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_strides_change_nothing(name, autocast, kernel):
    """Nor does a gradient that is one number everywhere."""
    case = case_of(name)
    turned = [leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf for leaf in case.leaves]
    turned = [t.repeat_interleave(2, 0)[::2] if t.ndim == 1 else t for t in turned]
    assert not any(t.is_contiguous() for t in turned if t.numel() > len(t) > 1)
    results = []
    for leaves in (case.leaves, turned):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = case.op(*leaves, **case.options)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
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
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(results_of(case.op, case.leaves, case.options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_what_is_kept_for_a_gradient_changes_nothing(name, autocast, kernel):
    """Nor which gradients are wanted."""
    case = case_of(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = results_of(case.op, case.leaves, case.options)
        with torch.no_grad():
            out = case.op(*case.leaves, **case.options)
        assert torch.equal(out, expected[0])
        for number, leaf in enumerate(case.leaves):
            leaves = list(case.leaves)
            leaves[number] = leaf.detach().requires_grad_()
            out = case.op(*leaves, **case.options)
            (found,) = torch.autograd.grad(out, leaves[number], cotangent(out))
            assert torch.equal(found, expected[number + 1])


@pytest.mark.parametrize("name", EACH)
def test_frames_of_bfloat16_come_out_as_float32_under_autocast(name, kernel):
    case = case_of(name)
    x = case.leaves[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = results_of(case.op, [x.float(), *case.leaves[1:]], case.options)
        got = results_of(case.op, [x, *case.leaves[1:]], case.options)
    assert [t.dtype for t in got[:3]] == [torch.float32, torch.bfloat16, torch.float32]
    expected[1] = expected[1].bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_convolution_module_does_not_see_padding(autocast, kernel):
    case = case_of("convolution module, ragged")
    (x, *weights), lengths = case.leaves, case.options["lengths"]
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    others = torch.where(padding[..., None], 1e3 * torch.randn(x.shape), x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = (
            results_of(case.op, [frames, *weights], case.options) for frames in (x, others)
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
    return torch.full_like(x, 3.0)


def _one_huge_frame(x: Tensor) -> Tensor:
    x = x.clone()
    x.flatten(0, -2)[-1] *= 1e30
    return x


def _all_huge(x: Tensor) -> Tensor:
    return 1e30 * x


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("change", [_constant_frames, _one_huge_frame, _all_huge])
@pytest.mark.parametrize("name", [*EACH, "feed-forward, as in the conformer"])
def test_extreme_frames(name, change, autocast, kernel):
    """What is finite in plain torch is finite; of frames without variance it is near, too."""
    case = case_of(name)
    leaves = [change(case.leaves[0]), *case.leaves[1:]]
    peer = results_of(case.in_torch, leaves, case.options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = results_of(case.op, leaves, case.options)
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
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, d_x, *gradients = results_of(case.op, [x[:0], *weights], options)
    assert out.shape == d_x.shape == x[:0].shape
    assert all((g == 0).all() for g in gradients)


def test_a_feed_forward_of_no_frames(kernel):
    x, *weights = case_of("feed-forward, odd frames").leaves
    out, _, *gradients = results_of(feed_forward, [x[:, :0], *weights], {})
    assert out.shape == (5, 0, 32)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.skipif(not native.multiplies_bfloat16(), reason="no products of bfloat16")
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
        assert saved <= kept * x.numel()
        with torch.no_grad():
            held = peak_bytes(lambda: case.op(*leaves, **case.options))
    assert held <= saved + out.nbytes
    gradients = sum(leaf.nbytes for leaf in leaves)
    held = peak_bytes(lambda: torch.autograd.grad(out, leaves, out.detach()))
    assert held <= gradients + 4096
