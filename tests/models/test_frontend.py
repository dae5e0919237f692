"""Convolutions, snake and the composed stem against their plain forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmm_jepa.models.convolution import FrameConv
from gmm_jepa.models.frontend import Snake, to_unit_rms
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.models.stem import stem

from .small import ragged_batch


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
