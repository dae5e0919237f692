"""Posterior, log-likelihood and argmax against float64, to the fast and the exact contract."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.gmm import GaussianMixture
from gmm_jepa.ops import Mixture, ensemble, triton_gmm

from .conftest import SILENCE

POSTERIOR = {"exact": 1e-5, "fast": 1e-3}
LOG_DENSITY = {"exact": 1e-4, "fast": 5e-3}
PRECISIONS = ("exact", "fast")


def _readable(case) -> torch.Tensor:
    """Rows without NaN: the posterior of the others is theirs."""
    return ~case.frames.isnan().any(1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_posterior(case, oracle, precision):
    frames, mixture = case.frames, case.mixture
    got = triton_gmm.gmm_posterior(frames, *mixture, 1.0, False, precision, torch.float32)
    expected = torch.softmax(oracle(frames, mixture), 1)
    rows = _readable(case)
    assert got.shape == expected.shape
    torch.testing.assert_close(
        got[rows].double(), expected[rows], atol=POSTERIOR[precision], rtol=0
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_posterior_at_a_temperature(case, oracle, precision):
    frames, mixture = case.frames, case.mixture
    got = triton_gmm.gmm_posterior(frames, *mixture, 2.5, True, precision, torch.float32)
    expected = torch.log_softmax(oracle(frames, mixture) / 2.5, 1)
    near = expected > -20
    # float32 holds log p(x, k), of a few hundred nats, to 6e-8 of its size
    size = float(oracle(frames, mixture)[near].abs().max()) if near.any() else 0.0
    torch.testing.assert_close(
        got[near].double(), expected[near], atol=LOG_DENSITY[precision] + 2e-7 * size, rtol=1e-6
    )
    taken_out = mixture.log_weights == -torch.inf
    assert (got[:, taken_out] == -torch.inf).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_likelihood(case, oracle, precision):
    got = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, precision)
    expected = torch.logsumexp(oracle(case.frames, case.mixture), 1)
    rows = _readable(case)
    torch.testing.assert_close(
        got[rows].double(), expected[rows], atol=LOG_DENSITY[precision], rtol=2e-7
    )


def test_argmax(case, oracle):
    posterior, index = triton_gmm.gmm_topk(case.frames, *case.mixture, 1, 3.0)
    expected = torch.softmax(oracle(case.frames, case.mixture) / 3.0, 1)
    rows = _readable(case)
    best, best_index = expected[rows].topk(1, 1)
    torch.testing.assert_close(posterior[rows].double(), best, atol=1e-5, rtol=0)
    clear = best_gap(expected[rows]) > 1e-5
    assert torch.equal(index[rows][clear], best_index[clear])


def best_gap(posterior: torch.Tensor) -> torch.Tensor:
    """(n,) by how much the best component leads."""
    if posterior.shape[1] == 1:
        return posterior[:, 0]
    first, second = posterior.topk(2, 1).values.unbind(1)
    return first - second


def test_topk(case, oracle, monkeypatch):
    """The three largest, in several chunks."""
    frames, mixture, K = case.frames, case.mixture, case.logits.shape[1]
    monkeypatch.setattr(triton_gmm, "_TOPK_VALUES", 150 * K)
    k = min(3, K)
    posteriors, indices = triton_gmm.gmm_topk(frames, *mixture, k, 2.0)
    rows = _readable(case)
    expected = torch.softmax(oracle(frames, mixture) / 2.0, 1)[rows]
    posteriors, indices = posteriors[rows].double(), indices[rows]
    torch.testing.assert_close(posteriors, expected.topk(k, 1).values, atol=1e-5, rtol=0)
    # whatever the order among equals, each index has the posterior beside it
    torch.testing.assert_close(posteriors, expected.gather(1, indices), atol=1e-5, rtol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_posterior_of_an_ensemble(case, oracle, precision, posteriors_by_kernel, chunks_of_rows):
    """The mean of two mixtures' posteriors, in several chunks."""
    frames, mixture = case.frames, case.mixture
    chunks_of_rows(150, case.logits.shape[1])
    other = mixture._replace(means=mixture.means + 0.2)
    lists = [list(pair) for pair in zip(mixture, other)]
    options = ([0.25, 0.75], 2.0, False, precision, torch.float32)
    got = ensemble.gmm_posterior_ensemble._init_fn(frames, *lists, *options)
    first, second = (torch.softmax(oracle(frames, m) / 2.0, 1) for m in (mixture, other))
    rows = _readable(case)
    torch.testing.assert_close(
        got[rows].double(), (0.25 * first + 0.75 * second)[rows], atol=POSTERIOR[precision], rtol=0
    )


@pytest.mark.parametrize(
    ("K", "D", "precision"),
    [(8192, 80, "fast"), (8192, 13, "exact"), (16, 512, "fast"), (16, 512, "exact")],
)
def test_the_largest_mixture_and_the_most_features(draw, oracle, K, D, precision):
    case = draw(3, K, D, spread=0.3)
    joint = oracle(case.frames, case.mixture)
    got = triton_gmm.gmm_posterior(case.frames, *case.mixture, 1.0, False, precision, torch.float32)
    expected = torch.softmax(joint, 1)
    torch.testing.assert_close(got.double(), expected, atol=POSTERIOR[precision], rtol=0)
    got = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, precision)
    expected, atol = torch.logsumexp(joint, 1), LOG_DENSITY[precision]
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=2e-7)


@pytest.mark.parametrize("log", [False, True])
def test_bf16_in_and_out(draw, oracle, log):
    case = draw(50, 40, 80, spread=0.2)
    frames = case.frames.bfloat16()
    got = triton_gmm.gmm_posterior(frames, *case.mixture, 1.0, log, "fast", torch.bfloat16)
    function = torch.log_softmax if log else torch.softmax
    expected = function(oracle(frames, case.mixture), 1)
    assert got.dtype == torch.bfloat16
    # two ulp of at most 2^-7, and what the fast contract allows before rounding
    atol = LOG_DENSITY["fast"] if log else POSTERIOR["fast"]
    torch.testing.assert_close(got.double(), expected, rtol=2 * 2.0**-7, atol=atol)


def test_strided_frames_are_read_in_place(draw, oracle):
    case = draw(33, 10, 12)
    wide = torch.full((12, 66), torch.nan, device=case.frames.device)
    wide[:, ::2] = case.frames.T
    frames = wide[:, ::2].T
    got = triton_gmm.gmm_posterior(frames, *case.mixture, 1.0, False, "fast", torch.float32)
    expected = torch.softmax(oracle(frames, case.mixture), 1)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


def test_a_nan_frame_spoils_its_own_row_only(draw):
    case = draw(20, 10, 12)
    clean = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, "fast")
    case.frames[3, 5] = torch.nan
    got = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, "fast")
    assert got.isnan().nonzero().flatten().tolist() == [3]
    keep = torch.arange(20) != 3
    assert torch.equal(got[keep], clean[keep])


@pytest.mark.parametrize("seed", range(4))
def test_fast_log_likelihood_of_pure_silence(device, oracle, seed):
    """The float32 product alone is up to 8e-3 off: its terms add up to 1e5 nats."""
    torch.manual_seed(seed)
    means, variances = -4.0 + 3.0 * torch.randn(64, 80), 0.1 + torch.rand(64, 80)
    means[0], variances[0] = SILENCE + 0.1 * torch.randn(80), 0.1
    mixture = Mixture(*(p.to(device) for p in (torch.randn(64).log_softmax(0), means, variances)))
    frames = torch.full((4, 80), SILENCE, device=device)
    expected = torch.logsumexp(oracle(frames, mixture), 1)
    got = triton_gmm.gmm_log_likelihood(frames, *mixture, "fast")
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


def _with_fine_parameters(mixture: Mixture, offset: float) -> Mixture:
    """Float64, and not what any float32 is."""
    log_weights, means, variances = (p.double() for p in mixture)
    means = means + offset + 1e-3 * torch.rand_like(means)
    return Mixture(log_weights, means, variances * (1.0 + 1e-9 * torch.rand_like(variances)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_a_float64_mixture(draw, oracle, offset, dtype):
    """As estimators have them. Near 1,000 float32 means alone would be off by 3e-5."""
    case = draw(60, 21, 80, spread=0.2)
    mixture = _with_fine_parameters(case.mixture, offset)
    frames = (case.frames + offset).to(dtype)
    joint = oracle(frames, mixture)
    expected = torch.softmax(joint, 1)
    got = triton_gmm.gmm_posterior(frames, *mixture, 1.0, False, "exact", torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=POSTERIOR["exact"], rtol=0)
    got = triton_gmm.gmm_log_likelihood(frames, *mixture, "exact")
    assert got.dtype == torch.float32
    likelihood = torch.logsumexp(joint, 1)
    torch.testing.assert_close(got.double(), likelihood, atol=LOG_DENSITY["exact"], rtol=2e-7)
    best, index = triton_gmm.gmm_topk(frames, *mixture, 1, 1.0)
    torch.testing.assert_close(best.double(), expected.amax(1, keepdim=True), atol=1e-5, rtol=0)
    clear = best_gap(expected) > 1e-5
    assert torch.equal(index[clear, 0], expected.argmax(1)[clear])


def test_the_low_part_of_a_mean_counts(draw, oracle):
    """Rounding this mixture to float32 would miss the contract."""
    case = draw(60, 21, 80, spread=0.2)
    mixture, frames = _with_fine_parameters(case.mixture, 1e3), case.frames + 1e3
    expected = torch.softmax(oracle(frames, mixture), 1)
    rounded = torch.softmax(oracle(frames, Mixture(*(p.float() for p in mixture))), 1)
    assert float((rounded - expected).abs().max()) > 1e-4


def test_an_estimator_runs_on_the_kernels(draw, device, monkeypatch):
    """Its parameters are float64; nothing falls back to plain torch."""
    case = draw(37, 9, 13, spread=0.3)
    model = GaussianMixture(9)
    model._set_mixture(case.mixture)
    mixture = model.mixture(device, torch.float64)

    def refuse(*arguments):
        raise AssertionError("plain torch")

    expected = model.predict_proba(case.frames.cpu().double())
    for name in ("posterior_reference", "log_likelihood_reference", "topk_reference"):
        monkeypatch.setattr(triton_gmm.posterior, name, refuse)
    got = triton_gmm.gmm_posterior(case.frames, *mixture, 1.0, False, "exact", torch.float32)
    torch.testing.assert_close(got.cpu().double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(
        triton_gmm.gmm_topk(case.frames, *mixture, 1, 1.0)[1].cpu()[:, 0], expected.argmax(1)
    )
    triton_gmm.gmm_log_likelihood(case.frames, *mixture, "exact")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_of_unlike_scales(draw, oracle, precision):
    """Squares of the features overflow float32."""
    case = draw(30, 6, 4)
    scale = torch.tensor([1e25, 1e-25, 1.0, 1e10], dtype=torch.float64, device=case.frames.device)
    log_weights, means, variances = (p.double() for p in case.mixture)
    mixture = Mixture(log_weights, means * scale, variances * scale**2)
    frames = (case.frames * scale).float()
    joint = oracle(frames, mixture)
    got = triton_gmm.gmm_posterior(frames, *mixture, 1.0, False, precision, torch.float32)
    expected = torch.softmax(joint, 1)
    torch.testing.assert_close(got.double(), expected, atol=POSTERIOR[precision], rtol=0)
    got = triton_gmm.gmm_log_likelihood(frames, *mixture, precision)
    expected, atol = torch.logsumexp(joint, 1), LOG_DENSITY[precision]
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=2e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_the_features_do_not_matter(draw, oracle, scale, precision):
    """Float16 parts are scaled: neither tiny nor huge features leave its range."""
    case = draw(30, 12, 20, spread=0.5)
    mixture = case.mixture._replace(
        means=case.mixture.means * scale, variances=case.mixture.variances.double() * scale**2
    )
    frames = case.frames * scale
    got = triton_gmm.gmm_posterior(frames, *mixture, 1.0, False, precision, torch.float32)
    expected = torch.softmax(oracle(frames, mixture), 1)
    torch.testing.assert_close(got.double(), expected, atol=POSTERIOR[precision], rtol=0)


def test_a_frame_far_off_keeps_finite_log_densities(draw, oracle):
    """Its square, 1e10 deviations, is beyond float16."""
    case = draw(8, 6, 10)
    case.frames[::2] *= 1e5
    got = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, "fast")
    expected = torch.logsumexp(oracle(case.frames, case.mixture), 1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5e-3)


def test_a_mixture_written_to_is_packed_anew(draw, oracle):
    case = draw(20, 10, 12)
    triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, "fast")
    case.mixture.means.add_(0.5)
    got = triton_gmm.gmm_log_likelihood(case.frames, *case.mixture, "fast")
    expected = torch.logsumexp(oracle(case.frames, case.mixture), 1)
    torch.testing.assert_close(got.double(), expected, atol=5e-3, rtol=0)


@pytest.mark.gpu
def test_the_ops_call_the_kernels_on_cuda(draw):
    case = draw(300, 64, 80)
    if case.frames.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    direct = triton_gmm.gmm_posterior(case.frames, *case.mixture, 1.0, False, "fast", torch.float32)
    assert torch.equal(ops.gmm_posterior(case.frames, case.mixture), direct)
