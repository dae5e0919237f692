"""DAAM in float64 against its formula, written out frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.models.daam import DensityAttention
from gmm_jepa.models.padding import frame_mask, zero_padding
from gmm_jepa.ops.density import MIN_FRAMES

from .small import shake


def by_formula(x: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
    """One row (T, C), T >= 8."""
    n_frames, channels = x.shape
    size = n_frames // 4
    out = []
    for h in range(4):
        chunk = x[h * size : (h + 1) * size] if h < 3 else x[3 * size :]
        columns = []
        for j in range(channels):
            column = chunk[:, j]
            mean = column.sum() / len(column)
            std = torch.sqrt(((column - mean) ** 2).sum() / (len(column) - 1) + 1e-8)
            log_density = 0
            for g in range(4):
                y = torch.clamp((column - mean - offsets[h, g]) / std, -10, 10)
                c2 = torch.clamp(widths[h, g], 0.01, 10) ** 2 + 1e-8
                log_density = log_density + (
                    -(y**2) / (2 * c2) - math.log(2 * math.pi) / 2 - torch.log(c2) / 2
                )
            columns.append(column + column * torch.softmax(log_density, dim=0))
        out.append(torch.stack(columns, dim=1))
    return torch.cat(out)


def daam_with_extremes() -> DensityAttention:
    daam = shake(DensityAttention().double())
    with torch.no_grad():
        daam.widths[0, 0], daam.widths[1, 1], daam.widths[2, 2] = 1e-4, 30.0, -1.0
        daam.offsets[3, 3] = 100.0  # clamps y
    return daam


def run(daam: DensityAttention, x: Tensor, how: str) -> list[Tensor]:
    """Output and gradients of x, offsets and widths, under a fixed random cotangent."""
    x = x.clone().requires_grad_()
    if how == "formula":
        y = by_formula(x[0], daam.offsets, daam.widths)[None]
    else:
        lengths = torch.tensor([x.shape[1]])
        y = daam(x, None if how == "whole" else frame_mask(lengths, x.shape[1]))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, (x, daam.offsets, daam.widths), cotangent)]


@pytest.mark.parametrize("how", ["whole", "masked"])
@pytest.mark.parametrize("n_frames", [8, 9, 11, 12, 31, 100])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 3.0), (40.0, -7.0)])
def test_formula(how: str, n_frames: int, scale: float, shift: float) -> None:
    daam = daam_with_extremes()
    x = shift + scale * torch.randn(1, n_frames, 3, dtype=torch.float64)
    for got, expected in zip(run(daam, x, how), run(daam, x, "formula"), strict=True):
        assert (got - expected).norm() <= 1e-8 * expected.norm() + 1e-11


def test_ragged_rows() -> None:
    daam = daam_with_extremes()
    lengths = torch.tensor([40, 0, 3, 7, 8, 11, 39, 23])
    mask = frame_mask(lengths, 40)
    x = zero_padding(torch.randn(8, 40, 3, dtype=torch.float64), mask)
    got = daam(x, mask)
    for row, n in enumerate(lengths.tolist()):
        alone = x[row, :n]
        expected = by_formula(alone, daam.offsets, daam.widths) if n >= MIN_FRAMES else alone
        torch.testing.assert_close(got[row, :n], expected)
        assert (got[row, n:] == 0).all()


@pytest.mark.parametrize("n_frames", range(8))
def test_identity_below_eight_frames(n_frames: int) -> None:
    daam = daam_with_extremes()
    x = torch.randn(2, n_frames, 3, dtype=torch.float64)
    assert torch.equal(daam(x, None), x)
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    y = daam(x, frame_mask(torch.tensor([n_frames, 0]), 12))
    assert torch.equal(y, x)
    gradients = torch.autograd.grad(y.sum(), (x, daam.offsets, daam.widths))
    assert torch.equal(gradients[0], torch.ones_like(x))
    assert all((g == 0).all() for g in gradients[1:])


def test_lengths_elsewhere_are_refused() -> None:
    daam, x = DensityAttention(), torch.zeros(2, 20, 3)
    mask = frame_mask(torch.zeros(2, dtype=torch.int64, device="meta"), 20)
    with pytest.raises(InputError, match="lengths_frames: on meta, but x on cpu"):
        daam(x, mask)


def test_constant_channel_has_finite_gradients() -> None:
    daam = DensityAttention()
    x = torch.full((1, 20, 2), 0.5, requires_grad=True)
    y = daam(x, None)
    torch.testing.assert_close(y, x * 1.2)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
