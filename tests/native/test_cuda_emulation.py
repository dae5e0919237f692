"""The CUDA EM kernels' algorithm, run serially on the CPU, against float64 oracles.

The cases are those of test_native.py. What the emulation shares with the kernels (csrc/cuda/tile.h)
is proved here; what it cannot prove is what only a GPU does: its copies, barriers and mma.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.features import log_mel
from gmm_jepa.ops import Mixture, cuda_em, native, native_mixture

_spec = importlib.util.spec_from_file_location(
    "gmm_jepa_native_cases", Path(__file__).with_name("test_native.py")
)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

if not hasattr(native._native, "em_statistics_emulated"):
    pytest.skip("the native module was built before its CUDA part", allow_module_level=True)


def small_odd():
    return cases.drawn(300, 100, 13)


def speech_like():
    """A log-mel's range and floor: an offset, sharp variances, heavy overlap of some components."""
    frames, mixture = cases.drawn(500, 300, 80, offset=-6.0, variance=(0.1, 6.0))
    means = mixture.means.clone()
    means[150:] = means[:150] + 0.3 * torch.randn(150, 80, dtype=torch.float64)
    return frames.clamp_min(-13.8), mixture._replace(means=means)


def wide():
    return cases.drawn(40, 70, 512)


def all_unscreened():
    return cases.drawn(64, 9, 5, variance=(1e-12, 1e-11), dtype=torch.float64)


def some_unscreened():
    """Components that are always, never and sometimes computed, at the depth of D = 80."""
    frames, mixture = cases.drawn(100, 150, 80, variance=(0.5, 60.0))
    log_weights, variances = mixture.log_weights.clone(), mixture.variances.clone()
    variances[::17] = 1e-12
    log_weights[::17] = -60.0  # light: their bound must not loosen that of all frames
    log_weights[[5, 149]] = -math.inf
    return frames, mixture._replace(log_weights=log_weights, variances=variances)


def crowded():
    """Every pair matters: more of them in a warp than the refinement remembers."""
    return cases.drawn(600, 70, 5, variance=(50.0, 90.0))


def columns_first():
    frames, mixture = cases.drawn(200, 90, 80)
    return frames.T.contiguous().T, mixture


CASES = cases.CASES | {
    "D_13": small_odd,
    "offset_1e3_D_80": lambda: cases.drawn(200, 100, 80, offset=1000.0),
    "speech_like": speech_like,
    "wide": wide,
    "all_unscreened": all_unscreened,
    "some_unscreened": some_unscreened,
    "half": lambda: cases.drawn(100, 64, 20, dtype=torch.float16),
    "crowded": crowded,
    "columns_first_D_80": columns_first,
    "float64_D_80": lambda: cases.drawn(300, 90, 80, dtype=torch.float64),
}


def assert_close(got, expected):
    for e, g in zip(expected, got, strict=True):
        size = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-12 * size)


def assert_statistics(frames, mixture, statistics=native_mixture.em_statistics_emulated):
    joint, x = cases.log_joint(frames, mixture), frames.double()
    r = torch.softmax(joint, 1)
    expected = (r.sum(0), r.T @ x, r.T @ x.square(), torch.logsumexp(joint, 1).sum())
    assert_close(statistics(frames, *mixture), expected)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_exact(name):
    assert_statistics(*CASES[name]())


@pytest.mark.parametrize("name", ["usual", "D_13", "offset", "far_away", "every_other"])
def test_hard_assignment(name):
    frames, mixture = CASES[name]()
    joint, x = cases.log_joint(frames, mixture), frames.double()
    best, labels = joint.max(1)
    r = torch.nn.functional.one_hot(labels, joint.shape[1]).double()
    expected = (r.sum(0), r.T @ x, r.T @ x.square(), best.sum())
    assert_close(native_mixture.em_statistics_emulated(frames, *mixture, hard=True), expected)


def test_hard_assignment_of_a_tie_goes_to_the_first():
    frames, mixture = CASES["duplicated_components"]()
    counts = native_mixture.em_statistics_emulated(frames, *mixture, hard=True)[0]
    assert set(counts.nonzero()[:, 0].tolist()) <= {0, 11, 22}
    assert counts.sum() == len(frames)


@pytest.mark.parametrize("name", ["usual", "D_13", "offset", "far_away", "wide", "float64_D_80"])
def test_statistics_of_nearest_centroids(name, monkeypatch):
    """As a mixture's of equal weights and variances."""
    frames, mixture = CASES[name]()
    monkeypatch.setattr(native_mixture, "em_statistics_cuda", native_mixture.em_statistics_emulated)
    monkeypatch.setattr(native_mixture, "runs_em_on", lambda _device: True)
    got = native_mixture.kmeans_statistics_cuda(frames, mixture.means)
    assert_close(got, ops.kmeans_statistics(frames.double(), mixture.means))


def test_chunks_and_segments_add_up():
    frames, mixture = cases.drawn(270_001, 3, 2)
    assert_statistics(frames, mixture)


def test_a_frame_that_is_not_finite_spoils_its_results():
    for value in (math.nan, math.inf, -math.inf):
        frames, mixture = cases.drawn(100, 30, 8)
        frames[57, 3] = value
        statistics = native_mixture.em_statistics_emulated(frames, *mixture)
        assert all(bool(field.isnan().all()) for field in statistics)


def test_same_bits_twice():
    frames, mixture = cases.drawn(500, 100, 24)
    once, again = (native_mixture.em_statistics_emulated(frames, *mixture) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize("name", ["usual", "speech_like", "offset", "constant_columns", "one_out"])
def test_the_bound_holds(name):
    """Lifted scores lie above the log-densities of whatever is within the margin of the best."""
    frames, mixture = CASES[name]()
    operands = cuda_em.pack(mixture)
    K, D = mixture.means.shape
    z = ((frames - operands.shift) * operands.inverse_scale).to(torch.bfloat16)
    square = (z.float() * z.float()).to(torch.bfloat16)
    order = cuda_em.even_first(torch.arange(D)[None])[0]
    features = torch.stack((z[:, order], square[:, order]), 2).flatten(1).double()
    scores = features @ operands.weights[:K, : 2 * D].double().T + operands.bias[:K]
    joint = cases.log_joint(frames, mixture)
    lowest = joint.amax(1, keepdim=True) - cuda_em.MARGIN_NATS
    threshold = (1.0 + operands.gain) * lowest
    matters = joint >= lowest
    assert (scores >= threshold)[matters].all()
    if name in ("usual", "speech_like"):  # and not by letting everything pass
        assert (scores >= threshold).double().mean() < 0.3


def test_which_components_are_screened():
    _, mixture = some_unscreened()
    operands = cuda_em.pack(mixture)
    always = torch.zeros(192, dtype=torch.bool)
    always[:150:17] = True
    never = torch.ones(192, dtype=torch.bool)
    never[:150] = mixture.log_weights == -math.inf
    assert torch.equal(operands.bias == math.inf, always)
    assert torch.equal(operands.bias == -math.inf, never)
    assert torch.equal(operands.guess.isfinite(), ~(always | never))


@pytest.mark.parametrize("name", ["usual", "speech_like", "D_13", "offset", "one_feature"])
def test_the_guess_is_the_marginal_log_density(name):
    """Of the features that the first sweep reads, up to the screen's rounding."""
    frames, mixture = CASES[name]()
    operands = cuda_em.pack(mixture)
    K, D = mixture.means.shape
    order = cuda_em.even_first(torch.arange(D)[None])[0][: cuda_em.guess_dims(D)]
    z = ((frames - operands.shift) * operands.inverse_scale)[:, order].to(torch.bfloat16)
    features = torch.stack((z, (z.float() * z.float()).to(torch.bfloat16)), 2).flatten(1).double()
    scores = features @ operands.weights[:K, : 2 * len(order)].double().T + operands.guess[:K]
    seen = Mixture(mixture.log_weights, mixture.means[:, order], mixture.variances[:, order])
    joint = cases.log_joint(frames[:, order], seen)
    best = scores.argmax(1, keepdim=True)
    lost = joint.amax(1) - joint.gather(1, best)[:, 0]
    assert lost.max() < 2.0


def test_speech(shared):
    soundfile = pytest.importorskip("soundfile")
    folder = shared / "speech"
    paths = [json.loads(line)["audio_filepath"] for line in (folder / "arctic.jsonl").open()][:6]
    frames = [log_mel(soundfile.read(folder / path, dtype="float32")[0]) for path in paths]
    frames = torch.from_numpy(np.concatenate(frames))
    g = torch.Generator().manual_seed(0)
    means = frames[torch.randperm(len(frames), generator=g)[:200]].double()
    mixture = Mixture(torch.full((200,), -math.log(200.0)).double(), means, means.new_ones(200, 80))
    for _ in range(3):
        assert_statistics(frames, mixture)
        counts, first, second, _ = native_mixture.em_statistics_emulated(frames, *mixture)
        counts = counts.clamp_min(1e-6)[:, None]
        mean = first / counts
        variances = (second / counts - mean.square()).clamp_min(0.1)
        mixture = Mixture((counts[:, 0] / counts.sum()).log(), mean, variances)


def test_a_size_that_the_kernels_are_not_made_for():
    frames, mixture = cases.drawn(3, 2, 513)
    with pytest.raises(ValueError, match="512 features"):
        native_mixture.em_statistics_emulated(frames, *mixture)


@pytest.mark.parametrize(
    ("frames", "mixture", "message"),
    [
        ((0, 2, 3, 3, 1), (8,) * 8 + (2, 3), "an address"),
        ((8, -1, 3, 3, 1), (8,) * 8 + (2, 3), "rows >= 0"),
        ((8, 2, 4, 4, 1), (8,) * 8 + (2, 3), "as many features as the mixture"),
        ((8, 2, 3, 3, 1), (8,) * 7 + (0, 2, 3), "mixture: expected addresses"),
        ((8, 2, 3, 3, 1), (8,) * 8 + (8193, 3), "1 to 8192 components"),
        ((8, 2, 3, 3, 1), (8,) * 8, "a tuple of 10, got one of 8"),
    ],
)
def test_what_is_refused_at_the_door(frames, mixture, message):
    with pytest.raises(ValueError, match=message):
        native._native.em_statistics_emulated(frames, False, mixture, (8,) * 4, (False, 34.0))
