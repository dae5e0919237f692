"""Mixtures, frames and float64 oracles for the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gmm_jepa.ops import Mixture
from tests.spoiled import outputs_begin_as_nan  # noqa: F401  # of all tests here


@dataclass(frozen=True)
class Case:
    """Frames, a mixture and what both are meant to provoke."""

    frames: Tensor
    mixture: Mixture


def random_mixture(K: int, D: int, *, offset: float = -4.0, spread: float = 3.0) -> Mixture:
    """A mixture in the range of log-mel features: means about -4 +- 3, variances from 0.1."""
    return Mixture(
        torch.randn(K).log_softmax(0),
        offset + spread * torch.randn(K, D),
        0.1 + torch.rand(K, D),
    )


def frames_of(mixture: Mixture, n: int) -> Tensor:
    """Frames drawn around the means, wider than the components."""
    k = torch.randint(mixture.means.shape[0], (n,))
    noise = 1.5 * torch.randn(n, mixture.means.shape[1])
    return mixture.means[k] + noise * mixture.variances[k].sqrt()


def log_joint(frames: Tensor, mixture: Mixture) -> Tensor:
    """The definition, float64: log p(x, k) (n, K) from (x - m)^2 / v."""
    w, m, v = (p.double() for p in mixture)
    square = (frames.double()[:, None] - m).square() / v
    return w - 0.5 * (square + v.log() + math.log(2 * math.pi)).sum(-1)


def _drawn(n: int, K: int, D: int, **kwargs: float) -> Case:
    mixture = random_mixture(K, D, **kwargs)
    return Case(frames_of(mixture, n), mixture)


def _silence() -> Case:
    case = _drawn(40, 7, 80)
    case.frames[::2] = math.log(1e-6)
    case.mixture.means[0] = math.log(1e-6)
    return case


def _at_floor() -> Case:
    case = _drawn(64, 12, 80, spread=0.5)
    case.mixture.variances[:] = 0.1
    return case


def _tiny_variances() -> Case:
    case = _drawn(50, 6, 20)
    case.mixture.variances[:] = 1e-3
    return Case(frames_of(case.mixture, 50), case.mixture)


def _one_component_out() -> Case:
    case = _drawn(30, 5, 8)
    case.mixture.log_weights[2] = -math.inf
    return case


def _constant_column() -> Case:
    case = _drawn(40, 5, 8)
    case.mixture.means[:, 3] = 2.5
    case.frames[:, 3] = 2.5
    return case


def _unlike_scales() -> Case:
    """Squares of the features overflow float32."""
    mixture = Mixture(*(p.double() for p in random_mixture(6, 4)))
    scale = torch.tensor([1e25, 1e-25, 1.0, 1e10], dtype=torch.float64)
    frames = (frames_of(mixture, 30) * scale).float()
    return Case(
        frames,
        mixture._replace(means=mixture.means * scale, variances=mixture.variances * scale**2),
    )


CASES: dict[str, Callable[[], Case]] = {
    "one_frame": lambda: _drawn(1, 16, 80),
    "empty": lambda: _drawn(0, 16, 80),
    "one_component": lambda: _drawn(17, 1, 80),
    "one_feature": lambda: _drawn(33, 5, 1),
    "primes": lambda: _drawn(101, 37, 13),
    "many_components": lambda: _drawn(20, 3001, 80),
    "across_chunks": lambda: _drawn(1500, 1024, 16),
    "silence": _silence,
    "at_floor": _at_floor,
    "tiny_variances": _tiny_variances,
    "shifted": lambda: _drawn(60, 9, 24, offset=1000.0),
    "one_component_out": _one_component_out,
    "constant_column": _constant_column,
    "unlike_scales": _unlike_scales,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(7)
    return CASES[request.param]()


@pytest.fixture
def drawn() -> Callable[..., Case]:
    return _drawn


@pytest.fixture
def oracle() -> Callable[[Tensor, Mixture], Tensor]:
    return log_joint
