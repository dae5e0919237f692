"""Several mixtures: the weighted mean of their posteriors, and the KL to it, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import Ensemble, Mixture

CASES = {
    "two": (40, 9, 13, (0.25, 0.75)),
    "one_alone": (40, 9, 13, (3.0,)),
    "three_primes": (101, 37, 13, (1.0, 2.0, 5.0)),
    "a_share_of_zero": (40, 9, 13, (0.0, 1.0)),
    "one_frame": (1, 16, 80, (1.0, 1.0)),
    "empty": (0, 16, 80, (1.0, 1.0)),
    "one_component": (17, 1, 80, (1.0, 1.0)),
    "silence": (20, 7, 80, (1.0, 1.0)),
    "component_out": (30, 5, 8, (1.0, 2.0)),
    "at_floor": (30, 12, 80, (1.0, 2.0)),
    "extreme_logits": (30, 12, 8, (1.0, 2.0)),
    "none_masked": (30, 12, 8, (1.0, 2.0)),
    "all_masked": (30, 12, 8, (1.0, 2.0)),
}


@pytest.fixture(params=CASES)
def batch(request, drawn):
    """Frames (N, D), ensemble, logits (N, K), row weights (N,)."""
    torch.manual_seed(11)
    N, K, D, shares = CASES[request.param]
    first = drawn(N, K, D, spread=1.0)
    # mixtures that name the same clusters: each a disturbance of the first
    mixtures = tuple(
        Mixture(
            torch.randn(K).log_softmax(0),
            first.mixture.means + 0.3 * torch.randn(K, D),
            0.1 + torch.rand(K, D) * (request.param != "at_floor"),
        )
        for _ in shares
    )
    frames = first.frames
    if request.param == "silence":
        frames[:] = math.log(1e-6)
    if request.param == "component_out":
        mixtures[0].log_weights[2] = -math.inf
    logits, weights = torch.randn(N, K), torch.rand(N) * (torch.rand(N) < 0.6)
    if request.param == "extreme_logits":
        logits = 80.0 * logits.sign() + logits
    if request.param in ("none_masked", "all_masked"):
        weights = torch.full((N,), float(request.param == "all_masked"))
    return frames, Ensemble(mixtures, shares), logits, weights


def _mean(frames, ensemble, oracle, temperature):
    """(N, K) float64, from the definition."""
    shares = torch.tensor(ensemble.shares, dtype=torch.float64)
    each = [torch.softmax(oracle(frames, m) / temperature, 1) for m in ensemble.mixtures]
    return sum(s * p for s, p in zip(shares / shares.sum(), each))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_posterior_is_the_weighted_mean(batch, oracle, precision):
    frames, ensemble, _, _ = batch
    expected = _mean(frames, ensemble, oracle, 2.0)
    got = ops.gmm_posterior(frames, ensemble, temperature=2.0, precision=precision)
    atol = {"exact": 1e-5, "fast": 1e-3}[precision]
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)
    log = ops.gmm_posterior(frames, ensemble, temperature=2.0, precision=precision, log=True)
    near = expected > math.exp(-20)
    atol = {"exact": 1e-4, "fast": 5e-3}[precision]
    torch.testing.assert_close(log.double()[near], expected.log()[near], atol=atol, rtol=0)


def _log_density(frames, ensemble, oracle):
    """(N,) float64, of the weighted mean of the mixtures' densities."""
    shares = torch.tensor(ensemble.shares, dtype=torch.float64)
    each = [torch.logsumexp(oracle(frames, m), 1) for m in ensemble.mixtures]
    return torch.logsumexp((shares / shares.sum()).log()[:, None] + torch.stack(each), 0)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_log_likelihood_is_that_of_the_weighted_mean(batch, oracle, precision):
    frames, ensemble, _, _ = batch
    got = ops.gmm_log_likelihood(frames, ensemble, precision=precision)
    assert got.dtype == torch.float32
    atol = {"exact": 1e-4, "fast": 5e-3}[precision]
    expected = _log_density(frames, ensemble, oracle)
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=2e-7)


def test_log_likelihood_gradient(batch, oracle):
    frames, ensemble, _, _ = batch
    reference = frames.double().requires_grad_()
    _log_density(reference, ensemble, oracle).sum().backward()
    x = frames.clone().requires_grad_()
    ops.gmm_log_likelihood(x, ensemble).sum().backward()
    size = max(1.0, *(reference.grad.abs().flatten().tolist() or [1.0]))
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("k", [1, 3])
def test_topk_is_the_head_of_the_mean_posterior(batch, oracle, k, monkeypatch):
    frames, ensemble, _, _ = batch
    monkeypatch.setattr("gmm_jepa.ops.ensemble.TARGET_VALUES", 64)  # several chunks
    mean = _mean(frames, ensemble, oracle, 2.0)
    k = min(k, mean.shape[1])
    posteriors, indices = ops.gmm_topk(frames, ensemble, k, temperature=2.0)
    assert posteriors.dtype == torch.float32
    torch.testing.assert_close(posteriors.double(), mean.topk(k, 1).values, atol=1e-5, rtol=0)
    # whatever the order among equals, each index has the posterior beside it
    torch.testing.assert_close(posteriors.double(), mean.gather(1, indices), atol=1e-5, rtol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_one_mixture_is_an_ensemble_of_one(drawn):
    case = drawn(20, 7, 5)
    alone = Ensemble((case.mixture,), (2.0,))
    for one, several in (
        (ops.gmm_log_likelihood(case.frames, m) for m in (case.mixture, alone)),
        (ops.gmm_topk(case.frames, m, 1)[1] for m in (case.mixture, alone)),
    ):
        torch.testing.assert_close(one, several, rtol=0, atol=0)


def test_one_graph_holds_likelihood_and_topk(drawn):
    case = drawn(20, 7, 5)
    both = Ensemble((case.mixture, case.mixture._replace(means=case.mixture.means + 0.2)), (1, 3))

    def function(frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.gmm_log_likelihood(frames.sin(), both), *ops.gmm_topk(frames.sin(), both, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for each in (function, compiled):
        x = case.frames.clone().requires_grad_()
        likelihood, best, index = each(x)
        likelihood.sum().backward()
        results.append((likelihood.detach(), best, index, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_kl_and_its_gradient(batch, oracle):
    frames, ensemble, logits, weights = batch
    rows = weights != 0
    w, p = weights[rows].double(), _mean(frames, ensemble, oracle, 1.5)[rows]
    reference = logits.double().requires_grad_()
    log_q = torch.log_softmax(reference[rows], 1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    loss = (w * (-(p * log_q).sum(1) - entropy)).sum()
    loss.backward()
    x = logits.clone().requires_grad_()
    poisoned = frames.masked_fill(~rows[:, None], math.nan)
    got = ops.masked_kl(x, poisoned, weights, ensemble, temperature=1.5)
    got.loss.backward()
    unit, spread = float(w.sum()), max(1.0, *(logits.abs().flatten().tolist() or [1.0]))
    atol = 1e-3 * spread * unit + 1e-9  # the fast posteriors' contract
    torch.testing.assert_close(got.loss.detach().double(), loss.detach(), rtol=1e-4, atol=atol)
    torch.testing.assert_close(
        got.target_entropy.double(), (w * entropy).sum(), rtol=1e-3, atol=1e-3 * unit
    )
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=1e-3)
    assert (x.grad[~rows] == 0).all()


def test_kl_equals_that_to_the_mean_posterior(batch):
    frames, ensemble, logits, weights = batch
    targets = ops.gmm_posterior(frames, ensemble)
    got = ops.masked_kl(logits, frames, weights, ensemble)
    for a, b in zip(got, ops.masked_kl_targets(logits, targets, weights)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_posterior_gradient(drawn, oracle, log):
    case = drawn(30, 7, 6, spread=0.5)
    other = case.mixture._replace(means=case.mixture.means + 0.4 * torch.randn(7, 6))
    ensemble, weight = Ensemble((case.mixture, other), (0.3, 0.7)), torch.randn(30, 7)
    reference = case.frames.double().requires_grad_()
    mean = _mean(reference, ensemble, oracle, 2.0)
    ((mean.log() if log else mean) * weight).sum().backward()
    x = case.frames.clone().requires_grad_()
    got = ops.gmm_posterior(x, ensemble, temperature=2.0, log=log, precision="exact")
    (got * weight).sum().backward()
    size = float(reference.grad.abs().max())
    assert size > 0.1
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=0, atol=1e-5 * size)


# See tests/ops/test_losses.py.
WITHOUT_TRACE = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("n", [0, 9])
def test_registration_holds_what_it_promises(drawn, n):
    case = drawn(n, 4, 5)
    mixtures = [[p, p + 0.1] for p in case.mixture]
    frames, logits = case.frames.requires_grad_(), torch.randn(n, 4, requires_grad=True)
    shares, library = [0.25, 0.75], torch.ops.gmm_jepa
    arguments = (frames, *mixtures, shares, 1.5, False, "fast", torch.float32)
    torch.library.opcheck(library.gmm_posterior_ensemble.default, arguments)
    arguments = (frames.detach(), *mixtures, shares, 2, 1.5)
    torch.library.opcheck(library.gmm_topk_ensemble.default, arguments)
    arguments = (logits, frames.detach(), torch.ones(n), *mixtures, shares, 1.5, True)
    torch.library.opcheck(library.masked_kl_ensemble.default, arguments, test_utils=WITHOUT_TRACE)


def test_user_errors(drawn):
    case = drawn(4, 3, 5)
    with pytest.raises(InputError, match="ensemble: expected a share for each"):
        ops.gmm_posterior(case.frames, Ensemble((), ()))
    with pytest.raises(InputError, match="shares: expected numbers from 0, not all 0"):
        ops.gmm_posterior(case.frames, Ensemble((case.mixture,), (0.0,)))
    smaller = Mixture(*(p[:2] for p in case.mixture))
    with pytest.raises(InputError, match="expected 3 components as in the first"):
        ops.masked_kl(
            torch.zeros(4, 3), case.frames, torch.ones(4), Ensemble((case.mixture, smaller), (1, 1))
        )
    for function in (ops.gmm_log_likelihood, lambda *a: ops.gmm_topk(*a, 1)):
        with pytest.raises(InputError, match="expected 3 components as in the first"):
            function(case.frames, Ensemble((case.mixture, smaller), (1, 1)))
        with pytest.raises(InputError, match="ensemble: expected a share for each"):
            function(case.frames, Ensemble((case.mixture,), (1, 1)))
    with pytest.raises(InputError, match="k: expected 1 to 3"):
        ops.gmm_topk(case.frames, Ensemble((case.mixture,), (1,)), 4)
