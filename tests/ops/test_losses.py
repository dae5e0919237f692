"""Masked losses: values, gradients, and what weight 0 must keep out."""

from __future__ import annotations

import math

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.ops import native, native_losses
from gmm_jepa.ops.masked_rows import Rows, first_largest

CASES = ("plain", "one_row", "empty", "all_masked_out", "one_class", "primes", "large_logits")


@pytest.fixture(params=[*native.instruction_sets(), "torch"], autouse=True)
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_losses, "_is_covered", lambda rows: False)
    else:
        native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set("")


@pytest.fixture(params=CASES)
def batch(request, drawn):
    """logits (N, K), frames (N, D), row weights (N,), mixture."""
    torch.manual_seed(3)
    N, K = {
        "one_row": (1, 9),
        "empty": (0, 9),
        "one_class": (13, 1),
        "primes": (101, 37),
    }.get(request.param, (64, 16))
    case = drawn(N, K, 13)
    logits = torch.randn(N, K)
    if request.param == "large_logits":
        logits = 80.0 * (torch.randint(0, 2, (N, K)) * 2.0 - 1.0) + torch.randn(N, K)
    weights = torch.rand(N) * (torch.rand(N) < 0.6)
    if request.param == "one_row":
        weights = torch.ones(1)
    if request.param == "all_masked_out":
        weights = torch.zeros(N)
    return logits, case.frames, weights, case.mixture


def test_a_gradient_is_a_plain_tensor():
    """Also where the incoming one is 1, and what was saved is given out as it is."""
    logits = torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        ops.masked_mse(logits, torch.zeros(4, 5), torch.ones(4)), logits
    )
    assert not gradient.requires_grad
    gradient.numpy()


def _oracle(logits, targets, weights):
    """loss, entropy, agreement in float64, from the definitions; loss differentiable."""
    p, log_q = targets.double(), torch.log_softmax(logits.double(), 1)
    weights = weights.double()
    entropy = -torch.special.xlogy(p, p).sum(1)
    loss = -(p * log_q).sum(1) - entropy
    same = (log_q.argmax(1) == p.argmax(1)).double()
    return (weights * loss).sum(), (weights * entropy).sum(), (weights * same).sum()


def _check(got, expected, *, rtol=1e-5, atol=2e-6):
    for name, g, e in zip(got._fields, got, expected):
        assert g.dtype == torch.float32
        assert g.shape == ()
        torch.testing.assert_close(g.double(), e, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_of_the_mixtures_posteriors(batch, oracle, temperature):
    logits, frames, weights, mixture = batch
    targets = torch.softmax(oracle(frames, mixture) / temperature, 1)
    reference = logits.double().requires_grad_()
    expected = _oracle(reference, targets, weights)
    got = ops.masked_kl(logits.requires_grad_(), frames, weights, mixture, temperature=temperature)
    total = float(weights.sum())
    # posteriors of the fast path are within 1e-3, so is the loss per nat of logit spread
    spread = float(logits.detach().abs().max()) if logits.numel() else 0.0
    tolerance = 1e-3 * max(1.0, spread) * max(total, 1e-3)
    _check(got, tuple(e.detach() for e in expected), rtol=1e-3, atol=tolerance)
    got.loss.backward()
    expected[0].backward()
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=1e-3, rtol=0)


def test_kl_equals_kl_of_given_posteriors(batch):
    """Given the posteriors the two losses agree within 1e-5."""
    logits, frames, weights, mixture = batch
    posteriors = ops.gmm_posterior(frames, mixture, temperature=3.0)
    _check(
        ops.masked_kl(logits, frames, weights, mixture, temperature=3.0),
        tuple(v.double() for v in ops.masked_kl_targets(logits, posteriors, weights)),
    )


def test_kl_of_given_targets(batch):
    logits, _, weights, _ = batch
    targets = torch.softmax(2.0 * torch.randn(logits.shape), 1)
    reference = logits.double().requires_grad_()
    expected = _oracle(reference, targets, weights)
    got = ops.masked_kl_targets(logits.requires_grad_(), targets, weights)
    _check(got, tuple(e.detach() for e in expected))
    (3.0 * got.loss).backward()
    (3.0 * expected[0]).backward()
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=3e-7, rtol=1e-5)


def test_kl_of_hard_and_underflowing_targets():
    """Targets with exact zeros, and posteriors down to e^-200."""
    logits = torch.randn(6, 5).requires_grad_()
    hard = torch.nn.functional.one_hot(torch.arange(6) % 5, 5).float()
    faint = torch.softmax(torch.tensor([[0.0, -100, -200, -90, -50]]).expand(6, 5), 1)
    for targets in (hard, faint):
        expected = _oracle(logits.detach(), targets, torch.ones(6))
        got = ops.masked_kl_targets(logits, targets, torch.ones(6))
        _check(got, expected)
        (gradient,) = torch.autograd.grad(got.loss, logits)
        torch.testing.assert_close(gradient, torch.softmax(logits.detach(), 1) - targets)


def test_kl_with_a_component_taken_out(drawn, oracle):
    case = drawn(20, 5, 4)
    case.mixture.log_weights[1] = -math.inf
    logits, weights = torch.randn(20, 5), torch.full((20,), 0.05)
    targets = torch.softmax(oracle(case.frames, case.mixture), 1)
    _check(
        ops.masked_kl(logits, case.frames, weights, case.mixture),
        _oracle(logits, targets, weights),
        atol=1e-4,
    )


def test_rows_that_share_memory():
    logits = torch.randn(7).expand(5, 7)
    labels, weights = torch.arange(5), torch.rand(5)
    shared = ops.masked_cross_entropy(logits, labels, weights)
    apart = ops.masked_cross_entropy(logits.clone(), labels, weights)
    assert torch.equal(shared.loss, apart.loss)
    shared, apart = (ops.masked_mse(x, torch.ones(5, 7), weights) for x in (logits, logits.clone()))
    assert torch.equal(shared, apart)


def test_kl_of_equal_distributions_is_zero():
    logits = 5.0 * torch.randn(50, 300)
    got = ops.masked_kl_targets(logits, torch.softmax(logits, 1), torch.full((50,), 0.02))
    assert abs(float(got.loss)) < 1e-6


def test_cross_entropy(batch):
    logits, _, weights, _ = batch
    N, K = logits.shape
    labels = torch.randint(K, (N,))
    reference = logits.double().requires_grad_()
    hard = torch.nn.functional.one_hot(labels, K).double()
    expected = _oracle(reference, hard, weights)
    got = ops.masked_cross_entropy(logits.requires_grad_(), labels, weights)
    _check(got, tuple(e.detach() for e in expected))
    got.loss.backward()
    expected[0].backward()
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=3e-7, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (31, 13), (64, 512)])
def test_mse(shape):
    prediction, target = torch.randn(shape) + 30.0, torch.randn(shape) + 30.0
    weights = torch.rand(shape[0])
    reference = prediction.double().requires_grad_()
    error = (reference - target.double()).square().mean(1)
    expected = (weights.double() * error).sum()
    got = ops.masked_mse(prediction.requires_grad_(), target, weights)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-9)
    got.backward()
    expected.backward()
    torch.testing.assert_close(prediction.grad.double(), reference.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", ["kl", "kl_targets", "cross_entropy", "mse"])
def test_rows_of_weight_zero_may_hold_anything(drawn, loss):
    case = drawn(12, 6, 5)
    weights = torch.zeros(12)
    weights[[1, 4, 7]] = torch.tensor([0.5, 1.0, 2.0])
    out = weights == 0
    logits, labels = torch.randn(12, 6), torch.arange(12) % 6
    targets = torch.softmax(torch.randn(12, 6), 1)

    def value_and_gradient(logits, frames, targets, labels, weights):
        logits = logits.clone().requires_grad_()
        result = {
            "kl": lambda: ops.masked_kl(logits, frames, weights, case.mixture).loss,
            "kl_targets": lambda: ops.masked_kl_targets(logits, targets, weights).loss,
            "cross_entropy": lambda: ops.masked_cross_entropy(logits, labels, weights).loss,
            "mse": lambda: ops.masked_mse(logits, targets, weights),
        }[loss]()
        result.backward()
        return result.detach(), logits.grad

    clean, clean_grad = value_and_gradient(logits, case.frames, targets, labels, weights)
    for poison in (math.nan, math.inf):
        dirty = [t.masked_fill(out[:, None], poison) for t in (logits, case.frames, targets)]
        value, grad = value_and_gradient(*dirty, labels.masked_fill(out, -100), weights)
        assert torch.equal(value, clean)
        assert torch.equal(grad, clean_grad)
        assert (grad[out] == 0).all()


@pytest.mark.parametrize("loss", ["kl", "cross_entropy", "mse"])
def test_bf16_is_rounded_once(drawn, oracle, loss):
    """Gradients of bf16 logits are those of the same values in float64, rounded to bf16."""
    case = drawn(40, 30, 8)
    logits = torch.randn(40, 30).bfloat16()
    weights, labels = torch.full((40,), 0.025), torch.arange(40) % 30
    reference = logits.double().requires_grad_()
    if loss == "mse":
        target = torch.randn(40, 30).bfloat16()
        expected = (weights * (reference - target.double()).square().mean(1)).sum()
        got = ops.masked_mse(logits.requires_grad_(), target, weights)
    elif loss == "kl":
        targets = ops.gmm_posterior(case.frames, case.mixture)
        expected = _oracle(reference, targets, weights)[0]
        got = ops.masked_kl(logits.requires_grad_(), case.frames, weights, case.mixture).loss
    else:
        expected = _oracle(reference, torch.eye(30)[labels], weights)[0]
        got = ops.masked_cross_entropy(logits.requires_grad_(), labels, weights).loss
    got.backward()
    expected.backward()
    assert got.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("K", [5, 96, 128, 160, 1000, 1024])
def test_the_first_of_equal_logits_counts(K):
    values = torch.randint(0, 3, (200, K)).float()
    expected = (values == values.amax(1, keepdim=True)).float().argmax(1)
    assert torch.equal(first_largest(values), expected)
    assert torch.equal(first_largest(values.T.contiguous().T), expected)


@pytest.mark.parametrize("loss", ["kl_targets", "cross_entropy", "mse"])
def test_chunks_and_a_scaled_backward_change_nothing(loss, monkeypatch):
    """Whole and in chunks of three rows; a weight on the loss scales the gradient."""
    rows, weights = torch.randn(50, 128), torch.rand(50) * (torch.arange(50) % 7 > 2)
    targets, labels = torch.softmax(torch.randn(50, 128), 1), torch.arange(50) % 128
    results = []
    for chunk, scale in ((1 << 17, 1.0), (3 * 128, 1.0), (3 * 128, 0.25)):
        monkeypatch.setattr("gmm_jepa.ops.masked_rows.CACHED_VALUES", chunk)
        x = rows.clone().requires_grad_()
        value = {
            "kl_targets": lambda x=x: ops.masked_kl_targets(x, targets, weights).loss,
            "cross_entropy": lambda x=x: ops.masked_cross_entropy(x, labels, weights).loss,
            "mse": lambda x=x: ops.masked_mse(x, targets, weights),
        }[loss]()
        (scale * value).backward(retain_graph=True)
        once = x.grad.clone()
        (scale * value).backward()
        torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)
        results.append((value.detach(), once / scale))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_without_a_count_the_same_values(drawn, monkeypatch):
    """Where the host must not wait all rows are computed and those of weight 0 blanked."""
    case = drawn(60, 6, 5)
    logits, weights = torch.randn(60, 6), (torch.arange(60) % 4).float()
    out = weights == 0
    case.frames[out], logits[out] = math.nan, math.inf
    results = []
    for blank in (False, True):
        if blank:
            monkeypatch.setattr(Rows, "gathers", staticmethod(lambda row_weights: False))
        x = logits.clone().requires_grad_()
        loss, *rest = ops.masked_kl(x, case.frames, weights, case.mixture)
        mse = ops.masked_mse(x, torch.zeros_like(x), weights)
        labels = torch.full((60,), 2).masked_fill(out, -100)
        ce = ops.masked_cross_entropy(x, labels, weights).loss
        (loss + mse + ce).backward()
        results.append((loss.detach(), *rest, mse.detach(), ce.detach(), x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_only_the_loss_carries_a_gradient(drawn):
    case = drawn(5, 4, 3)
    got = ops.masked_kl(
        torch.zeros(5, 4, requires_grad=True), case.frames, torch.ones(5), case.mixture
    )
    assert got.loss.requires_grad
    assert not got.target_entropy.requires_grad
    assert not got.agreement.requires_grad
    with torch.no_grad():
        quiet = ops.masked_mse(
            torch.zeros(5, 4, requires_grad=True), torch.ones(5, 4), torch.ones(5)
        )
    assert not quiet.requires_grad
    assert float(quiet) == 5.0


def test_user_errors(drawn):
    case = drawn(5, 4, 3)
    logits, weights = torch.zeros(5, 4), torch.ones(5)
    with pytest.raises(InputError, match=r"logits, row_weights: expected \(N, K\) and \(N,\)"):
        ops.masked_kl(logits, case.frames, torch.ones(4), case.mixture)
    with pytest.raises(InputError, match="logits: expected 4 columns"):
        ops.masked_kl(torch.zeros(5, 3), case.frames, weights, case.mixture)
    with pytest.raises(InputError, match="frames: expected one per row"):
        ops.masked_kl(logits, case.frames[:4], weights, case.mixture)
    with pytest.raises(InputError, match="targets"):
        ops.masked_kl_targets(logits, torch.zeros(5, 3), weights)
    with pytest.raises(InputError, match="labels: expected int64"):
        ops.masked_cross_entropy(logits, torch.zeros(5, dtype=torch.int32), weights)
    with pytest.raises(InputError, match="target: expected"):
        ops.masked_mse(logits, torch.zeros(5, 3), weights)
    with pytest.raises(TypeError, match="prediction"):
        ops.masked_mse(logits.long(), logits, weights)


# All but opcheck's trace of the gradient: it adds up all outputs, and so wants the gradient's own.
WITHOUT_TRACE = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_registration_holds_what_it_promises(drawn, n, with_gradient):
    case = drawn(n, 4, 3)
    logits = torch.randn(n, 4, requires_grad=with_gradient)
    weights = (torch.arange(n) % 2).float()
    targets, labels = torch.softmax(torch.randn(n, 4), 1), torch.arange(n) % 4
    library = torch.ops.gmm_jepa
    for op, arguments in {
        library.masked_kl.default: (case.frames, weights, *case.mixture, 1.0),
        library.masked_kl_targets.default: (targets, weights),
        library.masked_cross_entropy.default: (labels, weights),
        library.masked_mse.default: (targets, weights),
    }.items():
        options = {"test_utils": WITHOUT_TRACE} if with_gradient else {}
        torch.library.opcheck(op, (logits, *arguments, with_gradient), **options)


def test_no_graph_break(drawn):
    case = drawn(20, 6, 5)
    weights, labels = (torch.arange(20) % 3).float(), torch.arange(20) % 6

    def loss(logits, frames, mixture):
        kl = ops.masked_kl(logits, frames, weights, mixture)
        ce = ops.masked_cross_entropy(logits, labels, weights)
        soft = ops.masked_kl_targets(logits, torch.full_like(logits, 1 / 6), weights)
        mse = ops.masked_mse(logits, torch.zeros_like(logits), weights)
        return 2.0 * kl.loss + ce.loss + soft.loss + mse, kl.target_entropy

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = torch.randn(20, 6)
    gradients = []
    for function in (loss, compiled):
        x = logits.clone().requires_grad_()
        function(x, case.frames, case.mixture)[0].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


ONES, TARGETS, FRAMES = torch.ones(6), torch.full((6, 4), 0.25), torch.zeros(6, 3)
MIXTURE = ops.Mixture(torch.zeros(4), torch.arange(12.0).view(4, 3), torch.ones(4, 3))
BOTH = ops.Ensemble((MIXTURE, MIXTURE), (1.0, 1.0))
LOSSES = {
    "KL": lambda x: ops.masked_kl(x, FRAMES, ONES, MIXTURE).loss,
    "KL, ensemble": lambda x: ops.masked_kl(x, FRAMES, ONES, BOTH).loss,
    "KL, targets": lambda x: ops.masked_kl_targets(x, TARGETS, ONES).loss,
    "cross-entropy": lambda x: ops.masked_cross_entropy(x, ONES.long(), ONES).loss,
    "squared error": lambda x: ops.masked_mse(x, TARGETS, ONES),
}


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_second_gradients_raise(name, scale):
    """Not none, nor zero."""
    torch.manual_seed(0)
    logits = torch.randn(6, 4, requires_grad=True)
    loss = scale * LOSSES[name](logits)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.square().sum(), logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (loss + gradient.square().sum()).backward()
