"""The operators of a conformer block's parts on CPUs: every kernel against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import native_blocks, native_encoder
from gmm_jepa.ops.dropout import _dropout, drawn_seed, dropout_reference
from tests.against_float64 import (
    KERNELS,
    assert_near,
    cotangent,
    largest,
    needs_native,
    needs_products,
    norm,
    on_kernel,
    on_one_thread_and_two,
    results_of,
)
from tests.block_cases import CASES, EACH, EPSILON, Case, case_of, feed_forward, self_attention

from .test_attention import keep_of
from .test_memory import peak_bytes


@pytest.fixture(params=KERNELS)
def kernel(request):
    with on_kernel(request.param, native_blocks, "_fits_maps") as name:
        yield name


def exact_of(case: Case) -> list[Tensor]:
    return results_of(case.in_torch, [leaf.double() for leaf in case.leaves], case.options)


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
@needs_native
def test_the_same_bits_on_one_thread_and_two(name, autocast):
    case = case_of(name)
    pairs = on_one_thread_and_two(lambda: results_of(case.op, case.leaves, case.options, autocast))
    assert all(torch.equal(a, b) for a, b in pairs)


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
@pytest.mark.parametrize("scale", [1e3, math.inf, math.nan])
def test_a_convolution_module_does_not_see_padding(scale, autocast, kernel):
    case = case_of("convolution module, ragged")
    (x, *weights), lengths = case.leaves, case.options["lengths"]
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    others = torch.where(padding[..., None], scale * torch.randn(x.shape), x)
    first, second = (
        results_of(case.op, [frames, *weights], case.options, autocast) for frames in (x, others)
    )
    assert torch.equal(second[0][padding].nan_to_num(), others[padding].nan_to_num())
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


DROPOUT_P = 0.3


def dropping(case: Case, seed: int) -> Callable[..., Tensor]:
    """The case's operator with dropout by torch's generator of that seed."""

    def op(*tensors: Tensor, **options) -> Tensor:
        torch.manual_seed(seed)
        return case.op(*tensors, **options, dropout_p=DROPOUT_P)

    return op


def kept_rows(shape: tuple[int, ...], seed: Tensor, kernel: str) -> Tensor:
    """What is kept of (..., n), times its scale: the native hash draws rows by their numbers."""
    if kernel == "torch":
        return dropout_reference(torch.ones(shape), seed, DROPOUT_P)
    n_rows, n = math.prod(shape[:-1]), shape[-1]
    return _dropout(torch.ones(n_rows, 4096), seed, DROPOUT_P)[:, :n].reshape(shape)


def kept_of(case: Case, seed: int, kernel: str) -> tuple[Tensor, ...]:
    """The masks of `dropping`."""
    torch.manual_seed(seed)
    drawn, x = drawn_seed(DROPOUT_P), case.leaves[0]
    if case.op is self_attention:
        return (keep_of(len(x), len(case.leaves[-1]), x.shape[1], int(drawn), DROPOUT_P),)
    output = kept_rows(x.shape, ~drawn if case.op is feed_forward else drawn, kernel)
    if case.op is feed_forward:
        return kept_rows((*x.shape[:-1], len(case.leaves[1])), drawn, kernel), output
    return (output,)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
def test_dropout_against_float64(name, autocast, kernel, monkeypatch):
    case = case_of(name)
    if kernel == "torch":
        monkeypatch.setattr(native_encoder, "_is_attention", lambda *tensors: False)
    keep = kept_of(case, 5, kernel)
    for mask in keep:
        assert set(mask.unique().tolist()) == {0.0, float(mask.max())}
        assert float(mask.mean()) == pytest.approx(1.0, abs=0.06)
    options = {**case.options, "keep": keep}
    exact = results_of(case.in_torch, [leaf.double() for leaf in case.leaves], options)
    peer = results_of(case.in_torch, case.leaves, options, autocast)
    got = results_of(dropping(case, 5), case.leaves, case.options, autocast)
    factor, size = (1.2, norm) if autocast else (2, largest)
    assert_near(got, peer, exact, factor=factor, unit=unit_of(name), size=size)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", EACH)
@needs_native
def test_dropout_is_the_same_on_one_thread_and_two(name, autocast):
    case = case_of(name)
    arguments = (dropping(case, 7), case.leaves, case.options, autocast)
    assert all(torch.equal(a, b) for a, b in on_one_thread_and_two(lambda: results_of(*arguments)))


@pytest.mark.parametrize("name", EACH)
def test_dropout_is_drawn_anew_at_every_call(name, kernel):
    case = case_of(name)
    torch.manual_seed(0)
    first, second = (case.op(*case.leaves, **case.options, dropout_p=0.5) for _ in "12")
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(case.op(*case.leaves, **case.options, dropout_p=0.5), first)
    with pytest.raises(InputError, match="dropout_p: expected at least 0 and below 1"):
        case.op(*case.leaves, **case.options, dropout_p=1.0)


def test_hidden_values_and_outputs_have_masks_of_their_own(kernel):
    case = case_of("feed-forward, as in the head")  # both are of one width
    hidden, output = kept_of(case, 0, kernel)
    agree = float(((hidden > 0) == (output > 0)).float().mean())
    assert agree == pytest.approx(DROPOUT_P**2 + (1 - DROPOUT_P) ** 2, abs=0.02)


# Behind the tensors, without `narrow`: of the operator and of its gradient.
OPTIONS = {
    "feed_forward": ((0.5, EPSILON, DROPOUT_P, True), (0.5, EPSILON, DROPOUT_P)),
    "self_attention": ((DROPOUT_P,), (DROPOUT_P,)),
    "convolution_module": ((EPSILON, DROPOUT_P), (DROPOUT_P,)),
}


@pytest.mark.parametrize(
    ("narrow", "dtype"),
    [
        (False, torch.float32),
        (True, torch.float32),
        (False, torch.float64),
        (False, torch.bfloat16),
    ],
    ids=["float32", "narrow", "float64", "bfloat16"],
)
@pytest.mark.parametrize("name", EACH)
def test_opcheck(name, narrow, dtype):
    """With and without what may be left out: norm or lengths, and dropout."""
    case, op = case_of(name), name.split(",")[0].replace("-", "_").replace(" ", "_")
    forward, backward = (getattr(torch.ops.gmm_jepa, op + end).default for end in ("", "_backward"))
    leaves = [leaf.to(dtype).requires_grad_() for leaf in case.leaves]
    seed = torch.tensor([3])
    if op == "feed_forward":
        variants = ([*leaves, seed], [*leaves[:5], None, None, None])
    else:
        variants = ([*leaves, case.options["lengths"], None], [*leaves, None, seed])
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


@needs_native
@pytest.mark.parametrize("length", [-1, 10])
@pytest.mark.parametrize("name", ["self-attention", "convolution module"])
def test_lengths_beyond_the_frames_are_refused(name, length):
    case = case_of(f"{name}, no frames at all")
    with pytest.raises(ValueError, match="lengths_frames"):
        case.op(*case.leaves, lengths=torch.tensor([9, length]))
    with pytest.raises(InputError, match="lengths_frames: expected integers"):
        case.op(*case.leaves, lengths=torch.tensor([9.0, 9.0]))
