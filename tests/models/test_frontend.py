"""Convolutions, snake, the composed stem and the whole front end against their plain forms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models import stem as stem_module
from gmm_jepa.models.convolution import FrameConv
from gmm_jepa.models.frontend import FrontEnd, Snake, to_unit_rms
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.models.stem import stem
from gmm_jepa.ops import fused, native
from tests.against_float64 import assert_near, cotangent, needs_native, needs_products, norm

from .small import FULL, ragged_batch, shake


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 5, "padding": 5}, {"groups": 4}]
)
def test_frame_conv_is_conv1d(options: dict[str, int]) -> None:
    torch.manual_seed(3)
    ours = FrameConv(4, 8, 3, **options)
    torch.manual_seed(3)
    theirs = nn.Conv1d(4, 8, 3, **options)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 21, 4)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("kernel", [7, 8, 10, 12, 16])
@pytest.mark.parametrize("channels", [1, 4, 6, 8, 12, 15, 16, 32])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_of_few_channels(channels: int, kernel: int, autocast: bool) -> None:
    """oneDNN's own are unrelated to the inputs for some of these, where the processor has AMX."""
    torch.manual_seed(0)
    conv = FrameConv(channels, 16, kernel, stride=kernel // 2, padding=2)
    x = torch.randn(2, 200, channels).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = (conv if autocast else conv.bfloat16())(x)
    expected = conv.double()(x.double())
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.01 * expected.norm()


def test_float64_stays_under_autocast() -> None:
    conv = FrameConv(4, 8, 7).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 30, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("n_frames", [1, 4, 5, 21, 60])
def test_phases_are_the_dilated_convolution(n_frames: int) -> None:
    conv = FrameConv(4, 4, 3, dilation=5, padding=5).double()
    x = torch.randn(2, n_frames, 4, dtype=torch.float64, requires_grad=True)
    leaves = (x, conv.weight, conv.bias)
    plain, phases = conv(x), conv.by_phases(x)
    torch.testing.assert_close(phases, plain)
    cotangent = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(phases, leaves, cotangent),
        torch.autograd.grad(plain, leaves, cotangent),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stride", [2, 3, 5, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_stem_is_two_convolutions(stride: int, masked: bool) -> None:
    first = FrameConv(1, 3, 7, padding=3).double()
    strided = FrameConv(3, 4, 2 * stride, stride=stride, padding=stride // 2).double()
    lengths = [200 + i for i in range(stride)] if masked else [203, 203]
    lengths += [*range(2 * stride + 2), 1] if masked else []
    waveform, lengths_samples = ragged_batch(lengths)
    waveform = waveform.double()
    parameters = [*first.parameters(), *strided.parameters()]

    got = stem(waveform, lengths_samples if masked else None, first, strided)
    pieces = []
    total = torch.zeros(())
    for row, n in enumerate(lengths):
        if n < 2 * stride:
            continue
        expected = strided(first(waveform[row : row + 1, :n, None]))[0]
        torch.testing.assert_close(got[row, : len(expected)], expected)
        cotangent = torch.randn_like(expected)
        pieces.append((got[row, : len(expected)] * cotangent).sum())
        total = total + (expected * cotangent).sum()
    assert len(pieces) >= 2
    for g, e in zip(
        torch.autograd.grad(sum(pieces), parameters),
        torch.autograd.grad(total, parameters),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snake(dtype: torch.dtype) -> None:
    snake = Snake(3).to(dtype)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([-2.0, 0.0, 3.0]))
    x = 4 * torch.randn(2, 5, 3, dtype=dtype)
    a = F.softplus(snake.alpha) + 0.01
    expected = x + torch.sin(a * x) ** 2 / a
    torch.testing.assert_close(snake(x, None), expected)
    mask = frame_mask(torch.tensor([5, 2]), 5)
    torch.testing.assert_close(snake(x, mask), expected * mask.keep.to(dtype))


def test_unit_rms() -> None:
    waveform, lengths = ragged_batch([1000, 300, 1, 0])
    got = to_unit_rms(waveform, lengths)
    for row, n in zip(got, lengths.tolist()):
        if n:
            assert row[:n].square().mean().item() == pytest.approx(1, rel=1e-4)
        assert (row[n:] == 0).all()
    assert (to_unit_rms(torch.zeros(1, 50), None) == 0).all()


# Residual blocks of 16 and of 32 channels, dilations 1, 1, 1 and 1, 3, 5.
WIDE = replace(FULL, channels=(6, 16, 32), strides=(4, 5), code_dim=32, daam=False)
OPERATORS = ("waveform_conv", "strided_conv", "residual_block", "residual_unit")


@pytest.fixture
def calls(monkeypatch) -> Callable[[], tuple[int, ...]]:
    """How often each of `OPERATORS` was called."""
    counts = dict.fromkeys(OPERATORS, 0)
    for name in OPERATORS:
        module = stem_module if name == "waveform_conv" else ops
        op = getattr(module, name)

        def counting(*arguments, name=name, op=op, **options):
            counts[name] += 1
            return op(*arguments, **options)

        monkeypatch.setattr(module, name, counting)
    return lambda: tuple(counts.values())


def results_of_front_end(
    model: FrontEnd, waveform: Tensor, lengths: Tensor | None, *, autocast: bool = False
) -> list[Tensor]:
    """Frames and the gradients of all parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frames, mask = model(waveform, lengths)
    assert (mask is None) == (lengths is None)
    if mask is not None:
        assert (frames[mask.keep.expand_as(frames) == 0] == 0).all()
    return [frames.detach(), *torch.autograd.grad(frames, model.parameters(), cotangent(frames))]


@contextlib.contextmanager
def noting_kinks(least: list[float]):
    """To `least`: how near zero values come that a leaky ReLU takes, but for padding's zeros."""
    leaky_relu = F.leaky_relu

    def noting(x: Tensor, slope: float) -> Tensor:
        least.append(float(x[x != 0].abs().min()))
        return leaky_relu(x, slope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "leaky_relu", noting)
        yield


def drawn_front_end(config, lengths: list[int] | None) -> tuple[FrontEnd, Tensor, Tensor | None]:
    """Such that rounding takes no value across the kink of a leaky ReLU."""
    for seed in range(50):
        torch.manual_seed(seed)
        model = shake(FrontEnd(config))
        waveform, given = ragged_batch(lengths or [803, 803], padding=torch.nan)
        given = None if lengths is None else given
        least = []
        with noting_kinks(least), torch.no_grad():
            model.double()(waveform.double(), given)
        if min(least) > 5e-6:
            return model.float(), waveform, given
    raise AssertionError("every draw is near a kink")


@needs_native
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("lengths", [None, [803, 0, 411, 5, 47, 802]], ids=["whole", "ragged"])
def test_a_front_end_of_operators_is_as_near_as_a_composed_one(lengths, autocast, calls):
    """To one in float64; rows of no sample and of too few for a frame come out as zeros."""
    model, waveform, lengths = drawn_front_end(WIDE, lengths)
    before = calls()
    got = results_of_front_end(model, waveform, lengths, autocast=autocast)
    products = autocast and native.multiplies_bfloat16()
    assert before == (0, 0, 0, 0)
    assert calls() == (1, int(products), 4, 0)
    with fused.composed():
        peer = results_of_front_end(model, waveform, lengths, autocast=autocast)
    assert calls() == (1, int(products), 4, 0)
    exact = results_of_front_end(model.double(), waveform.double(), lengths)
    # Rounding to bfloat16 takes values across kinks, which gradients show.
    factor, unit = (2, 1e-2) if autocast else (1.5, 3e-6)
    assert_near(got, peer, exact, factor=factor, unit=unit, size=norm)


@needs_native
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_front_end_with_density_attention(autocast):
    """Its frames: gradients through so few of them lose most digits in either form."""
    model, waveform, lengths = drawn_front_end(replace(WIDE, daam=True), [803, 0, 411, 802])

    def frames_of(waveform: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            return [model(waveform, lengths)[0]]

    got = frames_of(waveform)
    with fused.composed():
        peer = frames_of(waveform)
    model.double()
    exact = frames_of(waveform.double())
    assert exact[0].dtype == torch.float64
    unit = 1e-3 if autocast else 3e-6
    assert_near(got, peer, exact, factor=1.5, unit=unit, size=norm)


@needs_native
@pytest.mark.parametrize(
    ("channels", "blocks", "expected"),
    [
        ((6, 16, 32), 3, (1, 0, 4, 6)),  # dilations 1, 9, 25 reach too far
        ((6, 16, 64), 2, (1, 0, 2, 6)),
        ((6, 24, 8), 1, (1, 0, 0, 6)),
    ],
)
def test_which_residual_units_are_taken_together(channels, blocks, expected, calls):
    model = FrontEnd(replace(WIDE, channels=channels, residual_blocks=blocks))
    waveform, lengths = ragged_batch([803, 411])
    with torch.no_grad():
        got, _ = model(waveform, lengths)
        assert calls() == expected
        with fused.composed():
            composed, _ = model(waveform, lengths)
    torch.testing.assert_close(got, composed, rtol=1e-4, atol=1e-5)


@needs_products
def test_silence_in_bfloat16_stays_finite():
    model = FrontEnd(WIDE)
    waveform, lengths = torch.zeros(3, 803), torch.tensor([803, 0, 500])
    assert all(
        t.isfinite().all() for t in results_of_front_end(model, waveform, lengths, autocast=True)
    )
