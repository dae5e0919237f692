"""The float32 screen loses nothing, its error bound holds, and it steps aside where it must."""

import math

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.ops.mixture import Mixture, quadratic
from gmm_jepa.ops.screen import MARGIN_NATS, Screen


def mixture(K, D, *, offset=0.0, spread=3.0, variance=(0.1, 2.0), seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.05
    means = offset + spread * torch.randn(K, D, generator=g, dtype=torch.float64)
    low, high = variance
    variances = low + (high - low) * torch.rand(K, D, generator=g, dtype=torch.float64)
    return Mixture((weights / weights.sum()).log(), means, variances)


def frames_near(mix, n, *, seed=1, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(len(mix.means), (n,), generator=g)
    z = torch.randn(n, mix.means.shape[1], generator=g, dtype=torch.float64)
    return (mix.means[k] + noise * mix.variances[k].sqrt() * z).float()


def direct(frames, mix):
    """(n, K) float64 log p(x, k) by the definition."""
    x = frames.double()[:, None]
    density = (x - mix.means).square() / mix.variances + (2 * math.pi * mix.variances).log()
    return mix.log_weights - 0.5 * density.sum(-1)


CASES = {
    "speech-like": mixture(64, 80),
    "shifted": mixture(64, 80, offset=-9.0),
    "small variances": mixture(32, 13, variance=(1e-3, 1e-2)),
    "one component": mixture(1, 5),
    "two far apart": mixture(2, 3, spread=100.0),
    "overlapping": mixture(50, 4, spread=0.3),
    "one dimension": mixture(7, 1),
}


@pytest.mark.parametrize("name", ["speech-like", "shifted", "small variances"])
def test_candidates_hold_everything_that_counts(name):
    mix = CASES[name]
    frames = frames_near(mix, 200)
    screen = Screen(mix, quadratic(mix, torch.float64))
    found = screen.candidates(screen.exact.features(frames))
    assert found is not None
    expected = direct(frames, mix)
    dense = torch.zeros_like(expected)
    dense[found.rows, found.components] = found.responsibilities()
    torch.testing.assert_close(dense, expected.softmax(1), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.log_likelihoods(), expected.logsumexp(1), rtol=1e-11, atol=0)
    assert (dense.sum(1) - 1).abs().max() < 1e-12


def test_speech_like_frames_are_screened_to_a_few():
    mix = CASES["speech-like"]
    screen = Screen(mix, quadratic(mix, torch.float64))
    found = screen.candidates(screen.exact.features(frames_near(mix, 500)))
    assert found is not None
    assert len(found.rows) < 500 * 8


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("noise", [0.0, 1.0, 30.0])
def test_the_error_bound_holds(name, noise):
    mix = CASES[name]
    exact, coarse = quadratic(mix, torch.float64), quadratic(mix, torch.float32)
    screen = Screen(mix, exact)
    features = exact.features(frames_near(mix, 300, noise=noise))
    wide = torch.addmm(exact.bias, features, exact.weight)
    narrow = torch.addmm(coarse.bias, features.float(), coarse.weight)
    bound = screen.error(features)
    assert ((narrow - wide).abs().amax(1) <= bound).all()
    assert (bound < math.inf).all()


@pytest.mark.parametrize("frames", [1e4, 1e6])
def test_it_steps_aside_where_float32_cannot_tell(frames):
    mix = mixture(16, 8, variance=(1e-6, 1e-5))
    screen = Screen(mix, quadratic(mix, torch.float64))
    far = torch.full((3, 8), frames)
    assert screen.candidates(screen.exact.features(far)) is None


def test_it_steps_aside_for_dense_responsibilities():
    mix = mixture(64, 2, spread=0.01, variance=(1.0, 1.1))
    screen = Screen(mix, quadratic(mix, torch.float64))
    assert screen.candidates(screen.exact.features(frames_near(mix, 50))) is None


def test_a_component_of_weight_zero_is_never_a_candidate():
    mix = CASES["speech-like"]
    weights = mix.log_weights.clone()
    weights[5] = -math.inf
    mix = mix._replace(log_weights=weights)
    screen = Screen(mix, quadratic(mix, torch.float64))
    near = mix.means[5:6].float().repeat(4, 1)
    found = screen.candidates(screen.exact.features(near))
    assert found is not None
    assert 5 not in found.components


@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_the_definition_on_either_path(name):
    mix = CASES[name]
    frames = frames_near(mix, 333)
    joint = direct(frames, mix)
    r, x = joint.softmax(1), frames.double()
    found = ops.em_statistics(frames, mix)
    for ours, theirs in zip(found, (r.sum(0), r.T @ x, r.T @ x**2, joint.logsumexp(1).sum())):
        scale = theirs.abs().amax()
        assert ((ours - theirs).abs().amax() / scale) < 1e-11


def test_what_is_left_out_weighs_nothing():
    assert np.exp(-MARGIN_NATS) * 8192 < 1e-10
