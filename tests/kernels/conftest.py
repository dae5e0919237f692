"""Named cases and float64 oracles for the Triton kernels.

Where there is no CUDA device the launchers run on CPU tensors in Triton's interpreter (the
environment variable is set in tests/conftest.py); the same cases run on CUDA, marked `gpu`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gmm_jepa import features
from gmm_jepa.data.audio import read_audio
from gmm_jepa.ops import Mixture, ensemble, triton_gmm
from tests.spoiled import outputs_begin_as_nan  # noqa: F401  # of all tests here

SILENCE = math.log(1e-6)
pytest.importorskip("triton", reason="Triton is not installed")


class Case(NamedTuple):
    """A mixture, frames, logits and weights, and what they are meant to provoke."""

    frames: Tensor  # (N, D)
    mixture: Mixture
    logits: Tensor  # (N, K)
    weights: Tensor  # (N,)


def drawn(N: int, K: int, D: int, *, spread: float = 3.0, floor: bool = False) -> Case:
    """Log-mel's range: means about -4 +- `spread`, variances from 0.1; frames near the means."""
    variances = 0.1 + torch.rand(K, D) * (not floor)
    means = -4.0 + spread * torch.randn(K, D)
    mixture = Mixture(torch.randn(K).log_softmax(0), means, variances)
    k = torch.randint(K, (N,))
    frames = means[k] + 1.5 * torch.randn(N, D) * variances[k].sqrt()
    weights = torch.rand(N) * (torch.rand(N) < 0.6) / max(1, N)
    return Case(frames, mixture, 2.0 * torch.randn(N, K), weights)


def _weighted(case: Case, weights: Tensor) -> Case:
    """Masked are the rows of weight other than 0: the losses are taken over those."""
    return case._replace(weights=weights)


def _silence() -> Case:
    case = drawn(40, 7, 80)
    case.mixture.means[0] = SILENCE + 0.1 * torch.randn(80)
    case.mixture.variances[0] = 0.1
    case.frames[:] = SILENCE
    return case


def _far() -> Case:
    """All densities underflow; the posteriors of all but one component do too."""
    case = drawn(20, 8, 80)
    return case._replace(frames=case.frames + 20.0)


def _component_out() -> Case:
    case = drawn(30, 5, 8)
    case.mixture.log_weights[2] = -math.inf
    return case


def _nan_where_masked() -> Case:
    case = drawn(70, 20, 13)
    out = case.weights == 0
    case.frames[out] = math.nan
    case.logits[out] = math.inf
    return case


def _extreme_logits() -> Case:
    case = drawn(50, 33, 13)
    signs = torch.randint(0, 2, case.logits.shape) * 2.0 - 1.0
    return case._replace(logits=80.0 * signs + torch.randn(signs.shape))


def _real_speech() -> Case:
    """Read speech, half of it masked, under components centred on some of its frames."""
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    folder = Path(__file__).parents[3] / "shared" / "speech"
    if not folder.is_dir():
        pytest.skip(f"no speech beside the repository: {folder} is absent")
    first = json.loads((folder / "arctic.jsonl").read_text().splitlines()[0])
    waveform = read_audio(folder / first["audio_filepath"], duration_s=2.0)
    frames = torch.as_tensor(features.log_mel(waveform))
    K, N = 50, 50
    mixture = Mixture(
        torch.full((K,), 1 / K).log(), frames[::2][:K].clone(), torch.full((K, 80), 0.1)
    )
    weights = (torch.arange(N) % 20 < 10).float() / N
    return Case(frames[1::2][:N].clone(), mixture, torch.randn(N, K), weights)


CASES: dict[str, Callable[[], Case]] = {
    "one_frame": lambda: drawn(1, 16, 80)._replace(weights=torch.ones(1)),
    "empty": lambda: drawn(0, 16, 80),
    "one_component": lambda: drawn(17, 1, 80),
    "one_feature": lambda: drawn(33, 5, 1),
    "primes": lambda: drawn(131, 37, 13),
    "components_not_a_power_of_two": lambda: drawn(9, 300, 24, spread=0.3),
    "overlapping": lambda: drawn(60, 130, 80, spread=0.1),
    "variances_at_the_floor": lambda: drawn(40, 12, 80, spread=0.4, floor=True),
    "silence": _silence,
    "far_from_everything": _far,
    "component_out": _component_out,
    "nan_where_masked": _nan_where_masked,
    "all_masked": lambda: _weighted(drawn(30, 9, 5), torch.full((30,), 1 / 30)),
    "none_masked": lambda: _weighted(drawn(30, 9, 5), torch.zeros(30)),
    "logits_of_80": _extreme_logits,
    "real_speech": _real_speech,
    # few rows of many: most tiles hold none
    "ragged": lambda: _weighted(drawn(387, 24, 20), torch.arange(387).remainder(129).lt(3) / 7.0),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The interpreter's device, or a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled, not interpreted, where there is a CUDA device")
    return request.param


def on(device: str, case: Case) -> Case:
    mixture = Mixture(*(p.to(device) for p in case.mixture))
    tensors = (t.to(device) for t in (case.frames, case.logits, case.weights))
    frames, logits, weights = tensors
    return Case(frames, mixture, logits, weights)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, device: str) -> Case:
    torch.manual_seed(7)
    return on(device, CASES[request.param]())


@pytest.fixture
def draw(device: str) -> Callable[..., Case]:
    return lambda *args, **kwargs: on(device, drawn(*args, **kwargs))


def log_joint(frames: Tensor, mixture: Mixture) -> Tensor:
    """The definition, float64: log p(x, k) (N, K) from (x - m)^2 / v."""
    w, m, v = (p.double() for p in mixture)
    square = (frames.double()[:, None] - m).square() / v
    return w - 0.5 * (square + v.log() + math.log(2 * math.pi)).sum(-1)


@pytest.fixture
def oracle() -> Callable[[Tensor, Mixture], Tensor]:
    return log_joint


@pytest.fixture
def posteriors_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble's posteriors come from the Triton kernel on a CPU, too."""
    monkeypatch.setattr(ensemble, "_posterior", triton_gmm.gmm_posterior)


@pytest.fixture
def chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets how many rows of how many components an ensemble makes the posteriors of at a time."""

    def set_to(n_rows: int, n_components: int) -> None:
        for name in ("TARGET_VALUES", "TARGET_VALUES_ELSEWHERE"):
            monkeypatch.setattr(ensemble, name, n_rows * n_components)

    return set_to
