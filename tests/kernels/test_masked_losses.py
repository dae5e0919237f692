"""Masked loss kernels against float64: loss, target entropy, agreement and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.ops import losses, triton_gmm

DTYPES = (torch.float32, torch.bfloat16)


def kl_oracle(logits: Tensor, targets: Tensor, weights: Tensor):
    """loss, entropy, agreement and gradient in float64, from the definitions."""
    rows = weights != 0
    w, p = weights[rows].double(), targets[rows].double()
    log_q = torch.log_softmax(logits[rows].double(), 1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    loss = -(p * log_q).sum(1) - entropy
    same = (log_q.argmax(1) == p.argmax(1)).double()
    gradient = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    gradient[rows] = w[:, None] * (log_q.exp() * p.sum(1, keepdim=True) - p)
    return (w * loss).sum(), (w * entropy).sum(), (w * same).sum(), gradient


def check(got, expected, *, rtol: float, atol: float, gradient_atol: float = 0.0) -> None:
    """Scalars and the gradient; `atol` is per unit of row weight."""
    for name, g, e in zip(("loss", "entropy", "agreement"), got[:-1], expected[:-1]):
        assert g.dtype == torch.float32
        assert g.shape == ()
        torch.testing.assert_close(g.double(), e, rtol=rtol, atol=atol, msg=name)
    gradient = got[-1]
    # two ulp of bf16 are at most 2^-6 of a value
    gradient_rtol = 2.0**-6 if gradient.dtype == torch.bfloat16 else rtol
    torch.testing.assert_close(
        gradient.double(), expected[-1], rtol=gradient_rtol, atol=gradient_atol
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl(case, oracle, dtype, temperature):
    frames, mixture, logits, weights = case
    logits = logits.to(dtype)
    got = triton_gmm.masked_kl(logits, frames, weights, *mixture, temperature, True)
    targets = torch.softmax(oracle(frames, mixture) / temperature, 1)
    expected = kl_oracle(logits, targets, weights)
    assert got[3].dtype == dtype
    total, heaviest = float(weights.sum()), float(weights.max()) if len(weights) else 0.0
    # posteriors within 1e-3: so is the loss, for each nat between the logits
    spread = _spread(logits[weights != 0])
    check(
        got,
        expected,
        rtol=1e-4,
        atol=1e-4 * spread * total + 1e-9,
        gradient_atol=1e-3 * heaviest,
    )
    assert (got[3][weights == 0] == 0).all()


def _spread(logits: Tensor) -> float:
    if logits.numel() == 0:
        return 1.0
    return max(1.0, float((logits.amax(1) - logits.amin(1)).max()))


def test_kl_given_its_own_posteriors(case):
    """Given the posteriors, the loss is right to 1e-5, whatever they are."""
    frames, mixture, logits, weights = case
    got = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    posteriors = triton_gmm.gmm_posterior(frames, *mixture, 1.0, False, "fast", torch.float32)
    expected = kl_oracle(logits, posteriors, weights)
    unit = float(weights.sum())
    check(got, expected, rtol=1e-5, atol=4e-6 * unit + 1e-12, gradient_atol=1e-6 * unit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_to_an_ensemble(case, oracle, dtype, posteriors_by_kernel, chunks_of_rows):
    """Two mixtures, in several chunks: the mean of their posteriors is the target."""
    frames, mixture, logits, weights = case
    chunks_of_rows(64, logits.shape[1])
    other = mixture._replace(means=mixture.means + 0.2)
    logits, lists = logits.to(dtype), [list(pair) for pair in zip(mixture, other)]
    got = triton_gmm.masked_kl_ensemble(logits, frames, weights, *lists, [0.25, 0.75], 2.0, True)
    first, second = (torch.softmax(oracle(frames, m) / 2.0, 1) for m in (mixture, other))
    expected = kl_oracle(logits, 0.25 * first + 0.75 * second, weights)
    total, heaviest = float(weights.sum()), float(weights.max()) if len(weights) else 0.0
    atol = 1e-4 * _spread(logits[weights != 0]) * total + 1e-9
    check(got, expected, rtol=1e-4, atol=atol, gradient_atol=1e-3 * heaviest)
    assert (got[3][weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_given_targets(case, dtype):
    _, _, logits, weights = case
    logits = logits.to(dtype)
    targets = torch.softmax(3.0 * torch.randn(logits.shape, device=logits.device), 1)
    if targets.shape[1] > 1:
        targets[::2, ::2] = 0.0  # 0 log 0, and rows that do not sum to one
    targets[weights == 0] = torch.nan
    got = triton_gmm.masked_kl_targets(logits, targets, weights, True)
    unit = float(weights.sum())
    expected = kl_oracle(logits, targets, weights)
    check(got, expected, rtol=1e-5, atol=4e-6 * unit, gradient_atol=1e-6 * unit)
    assert (got[3][weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(case, dtype):
    _, _, logits, weights = case
    N, K = logits.shape
    logits = logits.to(dtype)
    labels = torch.randint(K, (N,), device=logits.device)
    labels[weights == 0] = -100  # never read
    got = triton_gmm.masked_cross_entropy(logits, labels, weights, True)
    hard = torch.nn.functional.one_hot(labels.clamp_min(0), K)
    expected = kl_oracle(logits, hard, weights)
    unit = float(weights.sum())
    check(got, expected, rtol=1e-5, atol=4e-6 * unit, gradient_atol=1e-6 * unit)
    assert (got[3][weights == 0] == 0).all()


def test_a_wrong_label_shows(draw):
    case = draw(9, 5, 3)
    labels = torch.full((9,), 5, device=case.logits.device)
    loss, *_ = triton_gmm.masked_cross_entropy(case.logits, labels, case.weights + 1.0, False)
    assert loss.isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mse(case, dtype):
    """Predictor and teacher latents: here logits, and others far from zero."""
    _, _, prediction, weights = case
    rows = weights != 0
    prediction = (prediction + 30.0).to(dtype)
    target = torch.randn(prediction.shape, device=prediction.device).to(dtype) + 30.0
    target[~rows] = torch.nan
    loss, gradient = triton_gmm.masked_mse(prediction, target, weights, True)
    error = prediction[rows].double() - target[rows].double()
    w = weights[rows].double()
    torch.testing.assert_close(
        loss.double(), (w * error.square().mean(1)).sum(), rtol=1e-5, atol=1e-12
    )
    expected = torch.zeros(prediction.shape, dtype=torch.float64, device=loss.device)
    expected[rows] = 2.0 * w[:, None] * error / prediction.shape[1]
    rtol = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=1e-12)


def test_without_gradient_the_scalars_are_the_same(draw):
    case = draw(80, 21, 13)
    frames, mixture, logits, weights = case
    labels = torch.zeros(80, dtype=torch.int64, device=logits.device)
    targets = torch.softmax(logits, 1)
    for op, arguments in (
        (triton_gmm.masked_kl, (logits, frames, weights, *mixture, 1.0)),
        (triton_gmm.masked_kl_targets, (logits, targets, weights)),
        (triton_gmm.masked_cross_entropy, (logits, labels, weights)),
        (triton_gmm.masked_mse, (logits, targets, weights)),
    ):
        *scalars, gradient = op(*arguments, True)
        *alone, nothing = op(*arguments, False)
        assert all(torch.equal(a, b) for a, b in zip(scalars, alone))
        assert gradient.shape == logits.shape
        assert nothing.numel() == 0


def assert_same_of_any_layout(got: tuple, expected: tuple, weights: Tensor) -> None:
    """Equal but for the order of sums.

    The same bits are promised for the same input. Compiled for other strides, threads hold other
    values of a row and add them in another order: then the contract between losses is that of
    each with float64, 1e-5 relative (kernels/README.md), with the terms for what cancels as
    everywhere in this file. The interpreter adds in one order, whatever the strides.
    """
    compiled, unit = weights.is_cuda, float(weights.sum())
    for a, b in zip(got, expected):
        atol = (1e-6 if a.ndim else 4e-6) * unit
        torch.testing.assert_close(
            a, b, rtol=1e-5 if compiled else 0.0, atol=atol if compiled else 0.0
        )


def test_strided_rows_are_read_in_place_and_left_alone(draw):
    frames, mixture, logits, weights = draw(45, 21, 13)
    wide = torch.full((21, 90), torch.nan, device=logits.device)
    wide[:, ::2] = logits.T
    strided = wide[:, ::2].T
    before = wide.clone()
    got = triton_gmm.masked_kl(strided, frames, weights, *mixture, 1.0, True)
    expected = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    assert_same_of_any_layout(got, expected, weights)
    torch.testing.assert_close(wide, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["kl", "kl_ensemble", "kl_targets", "cross_entropy", "mse"])
@pytest.mark.parametrize("layout", ["transposed", "every_other_column", "expanded"])
def test_gradients_are_dense_whatever_the_logits(draw, loss, layout):
    """Compilers plan with the strides that the op's description promises."""
    frames, mixture, logits, weights = draw(45, 21, 13)
    strided = {
        "transposed": lambda: logits.T.contiguous().T,
        "every_other_column": lambda: logits.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: logits[:1].expand_as(logits),
    }[layout]()
    labels, targets = torch.arange(45, device=logits.device) % 21, torch.softmax(logits, 1)
    lists, options = [[p, p] for p in mixture], ([0.25, 0.75], 1.0, True)
    launch = {
        "kl": lambda a: triton_gmm.masked_kl(a, frames, weights, *mixture, 1.0, True),
        "kl_ensemble": lambda a: triton_gmm.masked_kl_ensemble(
            a, frames, weights, *lists, *options
        ),
        "kl_targets": lambda a: triton_gmm.masked_kl_targets(a, targets, weights, True),
        "cross_entropy": lambda a: triton_gmm.masked_cross_entropy(a, labels, weights, True),
        "mse": lambda a: triton_gmm.masked_mse(a, targets, weights, True),
    }[loss]
    got, expected = launch(strided), launch(strided.contiguous())
    assert got[-1].stride() == (21, 1)
    assert_same_of_any_layout(got, expected, weights)


def test_same_input_same_bits(draw):
    frames, mixture, logits, weights = draw(300, 21, 13)
    first = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    again = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize(("K", "D"), [(8192, 13), (16, 512)])
def test_kl_of_the_largest_mixture_and_the_most_features(draw, oracle, K, D):
    frames, mixture, logits, _ = draw(3, K, D, spread=0.3)
    weights = torch.tensor([0.5, 0.0, 0.25], device=logits.device)
    got = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    expected = kl_oracle(logits, torch.softmax(oracle(frames, mixture), 1), weights)
    atol = 1e-4 * _spread(logits) * 0.75
    check(got, expected, rtol=1e-4, atol=atol, gradient_atol=1e-3 * 0.5)
    assert (got[3][1] == 0).all()


@pytest.mark.gpu
def test_the_ops_call_the_kernels_on_cuda(draw):
    frames, mixture, logits, weights = draw(300, 64, 80)
    if logits.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    direct = triton_gmm.masked_kl(logits, frames, weights, *mixture, 1.0, True)
    got = ops.masked_kl(logits.requires_grad_(), frames, weights, mixture)
    got.loss.backward()
    assert torch.equal(got.loss.detach(), direct[0])
    assert torch.equal(logits.grad, direct[3])


def test_an_ensemble_of_float64_is_plain_torch(draw):
    """What is registered for CUDA, called on a CPU."""
    case = draw(20, 6, 5)
    lists = [[p, p + 0.1] for p in case.mixture]
    arguments = (case.logits.double(), case.frames, case.weights, *lists, [0.25, 0.75], 1.0, True)
    got = triton_gmm.masked_kl_ensemble(*arguments)
    for a, b in zip(got, losses.masked_kl_ensemble_reference(*arguments), strict=True):
        assert torch.equal(a, b)
