"""Collapse meters against plain definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from gmm_jepa.objectives.meters import embedding_meters, usage_entropy


def oracle(z: torch.Tensor) -> dict[str, float]:
    z = z.double()
    singular = torch.linalg.svdvals(z - z.mean(0))
    shares = singular / singular.sum()
    units = z / z.norm(dim=1, keepdim=True)
    cosines = units @ units.T
    pairs = ~torch.eye(len(z), dtype=torch.bool)
    return {
        "std": z.std(0, unbiased=False).mean().item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "mean_cosine": cosines[pairs].mean().item(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "shift"), [(200, 17, 0.0), (7, 32, 3.0), (97, 5, -100.0)])
def test_equals_the_definitions(n: int, d: int, shift: float, dtype: torch.dtype) -> None:
    z = (torch.randn(n, d) * torch.linspace(0.1, 2, d) + shift).to(dtype)
    for name, expected in oracle(z).items():
        meter = embedding_meters(z)[name]
        assert meter.shape == ()
        assert meter.dtype == torch.float32
        assert meter.item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_full_collapse() -> None:
    meters = embedding_meters(torch.randn(1, 8).expand(50, 8))
    assert meters["std"].item() == pytest.approx(0, abs=1e-6)
    assert meters["effective_rank"].item() == 0
    assert meters["mean_cosine"].item() == pytest.approx(1, abs=1e-6)


def test_rank_of_a_line_and_of_equal_axes() -> None:
    line = torch.randn(64, 1) * torch.randn(1, 12)
    assert embedding_meters(line)["effective_rank"].item() == pytest.approx(1, abs=1e-3)
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    meters = embedding_meters(axes)
    assert meters["effective_rank"].item() == pytest.approx(6, abs=1e-4)
    assert meters["mean_cosine"].item() == pytest.approx(-1 / 11, abs=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_rows(n: int) -> None:
    meters = embedding_meters(torch.randn(n, 4))
    assert {name: value.item() for name, value in meters.items()} == {
        "std": 0.0,
        "effective_rank": 0.0,
        "mean_cosine": 0.0,
    }


def test_a_broken_embedding_shows_as_nan_and_raises_nothing() -> None:
    z = torch.randn(10, 4)
    z[3, 1] = torch.nan
    assert all(value.isnan() for value in embedding_meters(z).values())


def test_a_row_of_zeros_is_orthogonal() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert embedding_meters(z)["mean_cosine"].item() == pytest.approx(1 / 3)


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"z: expected shape \(N, D\), got \(3,\)"):
        embedding_meters(torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts: expected shape"):
        usage_entropy(torch.zeros(3, 1))


def test_usage_entropy() -> None:
    assert usage_entropy(torch.full((16,), 3)).item() == pytest.approx(1)
    assert usage_entropy(torch.tensor([9, 0, 0])).item() == 0
    assert usage_entropy(torch.tensor([1, 1, 0, 0])).item() == pytest.approx(0.5)
    third = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(3)
    assert usage_entropy(torch.tensor([0.25, 0.75, 0.0])).item() == pytest.approx(third)
    for empty in (torch.zeros(5), torch.tensor([4.0]), torch.zeros(0)):
        assert usage_entropy(empty).item() == 0
