"""Posteriors, log-likelihoods and the most probable components against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import Mixture
from gmm_jepa.ops.posterior import log_likelihood_reference

POSTERIOR = {"exact": 1e-5, "fast": 1e-3}
LOG_LIKELIHOOD = {"exact": 1e-4, "fast": 5e-3}
PRECISIONS = ("exact", "fast")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_posterior_is_the_softmax_of_the_log_densities(case, oracle, precision, temperature):
    expected = torch.softmax(oracle(case.frames, case.mixture) / temperature, 1)
    got = ops.gmm_posterior(case.frames, case.mixture, temperature=temperature, precision=precision)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, atol=POSTERIOR[precision], rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_posterior_near_the_best(case, oracle, precision):
    expected = torch.log_softmax(oracle(case.frames, case.mixture), 1)
    got = ops.gmm_posterior(case.frames, case.mixture, log=True, precision=precision)
    near = expected > -20
    torch.testing.assert_close(
        got.double()[near], expected[near], atol=LOG_LIKELIHOOD[precision], rtol=1e-6
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_likelihood(case, oracle, precision):
    expected = torch.logsumexp(oracle(case.frames, case.mixture), 1)
    got = ops.gmm_log_likelihood(case.frames, case.mixture, precision=precision)
    assert got.shape == expected.shape
    tolerance = LOG_LIKELIHOOD[precision]
    if precision == "fast":  # promised for variances from 0.1; rounding grows with 1 / variance
        tolerance *= max(1.0, 0.1 / float(case.mixture.variances.min()))
    # float32 holds the value to 6e-8 of its size
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_fast_log_likelihood_of_pure_silence(oracle, seed):
    """Plain torch's too, whose float32 product alone is up to 7e-3 off (seeds 0 and 2)."""
    torch.manual_seed(seed)
    means, variances = -4.0 + 3.0 * torch.randn(64, 80), 0.1 + torch.rand(64, 80)
    means[0], variances[0] = -13.8155 + 0.1 * torch.randn(80), 0.1
    mixture = Mixture(torch.randn(64).log_softmax(0), means, variances)
    frames = torch.full((4, 80), math.log(1e-6))
    expected = torch.logsumexp(oracle(frames, mixture), 1)
    got = log_likelihood_reference(frames, *mixture, "fast")
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 16])
def test_topk_is_the_head_of_the_sorted_posterior(drawn, oracle, k):
    case = drawn(200, 16, 13)
    expected = torch.softmax(oracle(case.frames, case.mixture) / 2.0, 1).topk(k, 1)
    posteriors, indices = ops.gmm_topk(case.frames, case.mixture, k, temperature=2.0)
    assert posteriors.dtype == torch.float32
    torch.testing.assert_close(posteriors.double(), expected.values, atol=1e-6, rtol=0)
    assert torch.equal(indices, expected.indices)


def test_frames_far_from_everything_have_finite_answers(drawn, oracle):
    """All densities underflow; the log-densities do not."""
    case = drawn(20, 8, 80)
    frames = case.frames + 300.0
    expected = oracle(frames, case.mixture)
    got = ops.gmm_posterior(frames, case.mixture, precision="exact")
    torch.testing.assert_close(got.double(), torch.softmax(expected, 1), atol=1e-5, rtol=0)
    fast = ops.gmm_posterior(frames, case.mixture, precision="fast", log=True)
    assert torch.isfinite(fast).all()
    likelihood = ops.gmm_log_likelihood(frames, case.mixture)
    torch.testing.assert_close(likelihood.double(), torch.logsumexp(expected, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_posterior_gradient(drawn, oracle, precision, log, temperature):
    case = drawn(70, 11, 13, spread=0.5)  # components overlap: the gradient is not nothing
    weight = torch.randn(70, 11)
    reference = case.frames.double().requires_grad_()
    softmax = torch.log_softmax if log else torch.softmax
    expected = (softmax(oracle(reference, case.mixture) / temperature, 1) * weight).sum()
    expected.backward()
    assert reference.grad.abs().max() > 0.1
    frames = case.frames.clone().requires_grad_()
    got = ops.gmm_posterior(
        frames, case.mixture, log=log, temperature=temperature, precision=precision
    )
    (got * weight).sum().backward()
    size = reference.grad.abs().max()
    tolerance = {"exact": 1e-6, "fast": 1e-3}[precision]
    torch.testing.assert_close(frames.grad.double(), reference.grad, atol=tolerance * size, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_likelihood_gradient(case, oracle, precision):
    weight = torch.randn(case.frames.shape[0])
    _, m, v = (p.double() for p in case.mixture)
    r = torch.softmax(oracle(case.frames, case.mixture), 1)
    slope = r @ (m / v) - case.frames.double() * (r @ (1 / v))  # sum_k r_k (m_k - x) / v_k
    expected = slope * weight[:, None]
    frames = case.frames.clone().requires_grad_()
    likelihood = ops.gmm_log_likelihood(frames, case.mixture, precision=precision)
    (likelihood * weight).sum().backward()
    # each term is r (x - m) / v, so their size, not the sum's, sets the scale of rounding
    size = expected.abs().max() if weight.numel() else 1.0
    tolerance = {"exact": 1e-6, "fast": 2e-3}[precision]
    torch.testing.assert_close(frames.grad.double(), expected, atol=tolerance * size, rtol=0)


def test_leading_dimensions_and_strides_are_kept(drawn):
    case = drawn(30, 4, 6)
    flat = ops.gmm_posterior(case.frames, case.mixture)
    batch = case.frames.reshape(5, 6, 6)
    assert torch.equal(ops.gmm_posterior(batch, case.mixture), flat.reshape(5, 6, 4))
    strided = batch.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.gmm_posterior(strided, case.mixture), flat.reshape(5, 6, 4))
    assert ops.gmm_posterior(case.frames[0], case.mixture).shape == (4,)
    assert ops.gmm_log_likelihood(batch, case.mixture).shape == (5, 6)
    assert ops.gmm_topk(batch, case.mixture, 2)[1].shape == (5, 6, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_in_and_out(drawn, oracle, dtype):
    case = drawn(25, 6, 10)
    frames = case.frames.to(dtype)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.softmax(oracle(frames, case.mixture), 1)
    got = ops.gmm_posterior(frames, case.mixture, precision="exact")
    assert got.dtype == result
    assert ops.gmm_log_likelihood(frames, case.mixture).dtype == result
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    rounded = ops.gmm_posterior(frames, case.mixture, precision="exact", out_dtype=torch.bfloat16)
    # the native kernel gives zero below 2e-15
    torch.testing.assert_close(rounded.double(), expected, rtol=2**-7, atol=1e-14)


def test_small_chunks_change_nothing(drawn, monkeypatch):
    case = drawn(257, 8, 5)
    whole = ops.gmm_posterior(case.frames, case.mixture, precision="exact")
    likelihood = ops.gmm_log_likelihood(case.frames, case.mixture)
    monkeypatch.setattr("gmm_jepa.ops.mixture.CHUNK_VALUES", 8 * 16)
    chunked = ops.gmm_posterior(case.frames, case.mixture, precision="exact")
    torch.testing.assert_close(chunked, whole, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        ops.gmm_log_likelihood(case.frames, case.mixture), likelihood, atol=0, rtol=1e-7
    )


def test_same_input_same_bits(drawn):
    case = drawn(300, 64, 13)
    for precision in PRECISIONS:
        first = ops.gmm_posterior(case.frames, case.mixture, precision=precision)
        assert torch.equal(first, ops.gmm_posterior(case.frames, case.mixture, precision=precision))


def test_user_errors_name_the_argument(drawn):
    case = drawn(4, 3, 5)
    with pytest.raises(InputError, match=r"frames: expected \(\.\.\., 5\)"):
        ops.gmm_posterior(torch.zeros(4, 6), case.mixture)
    with pytest.raises(InputError, match="temperature: expected a number above 0, got 0"):
        ops.gmm_posterior(case.frames, case.mixture, temperature=0.0)
    with pytest.raises(InputError, match="temperature"):
        ops.gmm_posterior(case.frames, case.mixture, temperature=math.nan)
    with pytest.raises(InputError, match="precision"):
        ops.gmm_posterior(case.frames, case.mixture, precision="double")
    with pytest.raises(InputError, match="k: expected 1 to 3"):
        ops.gmm_topk(case.frames, case.mixture, 4)
    with pytest.raises(InputError, match="mixture: expected log_weights"):
        ops.gmm_posterior(case.frames, case.mixture._replace(log_weights=torch.zeros(4)))
    trained = case.mixture._replace(means=case.mixture.means.clone().requires_grad_())
    with pytest.raises(InputError, match="requires a gradient"):
        ops.gmm_posterior(case.frames, trained)
    with pytest.raises(TypeError, match="frames: expected a floating-point tensor, got list"):
        ops.gmm_posterior([[0.0] * 5], case.mixture)
    with pytest.raises(TypeError, match=r"got torch\.int64 tensor"):
        ops.gmm_posterior(torch.zeros(4, 5, dtype=torch.int64), case.mixture)


@pytest.mark.parametrize("n", [0, 9])
def test_registration_holds_what_it_promises(drawn, n):
    case = drawn(n, 3, 5)
    frames = case.frames.requires_grad_()
    library = torch.ops.gmm_jepa
    checks = {
        library.gmm_posterior.default: (frames, *case.mixture, 1.5, False, "fast", torch.float32),
        library.gmm_log_likelihood.default: (frames, *case.mixture, "exact"),
        library.gmm_topk.default: (frames.detach(), *case.mixture, 2, 1.0),
    }
    for op, arguments in checks.items():
        torch.library.opcheck(op, arguments)


def test_no_graph_break(drawn):
    case = drawn(20, 6, 5)

    def loss(frames: torch.Tensor, mixture: Mixture) -> torch.Tensor:
        posterior = ops.gmm_posterior(frames, mixture, temperature=2.0)
        likelihood = ops.gmm_log_likelihood(frames, mixture)
        best = ops.gmm_topk(frames, mixture, 1)[0]
        return (posterior.square().sum(1) * likelihood).sum() + best.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        frames = case.frames.clone().requires_grad_()
        function(frames, case.mixture).backward()
        gradients.append(frames.grad)
    torch.testing.assert_close(*gradients)
