"""Dropout of values: what it keeps, its gradient, its seed."""

from __future__ import annotations

import pytest
import torch

from gmm_jepa import ops
from gmm_jepa.ops import native, native_encoder
from gmm_jepa.ops.dropout import dropout_reference, hashed_dropout


def hashed(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    torch.manual_seed(int(seed))
    return hashed_dropout(x, p)


@pytest.fixture(params=[*native.instruction_sets(), "torch", "hashed"])
def dropped(request):
    """dropout(x, seed, p) by one kernel."""
    if request.param in ("torch", "hashed"):
        yield hashed if request.param == "hashed" else dropout_reference
        return
    native.use_instruction_set(request.param)
    yield native_encoder.dropout
    native.use_instruction_set("")


@pytest.mark.parametrize("shape", [(1,), (7,), (4096,), (4097, 3), (2, 0), (100, 1013)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_values_are_kept_and_scaled_or_zero(dropped, shape, p):
    x = torch.rand(shape) + 1
    y = dropped(x, torch.tensor([3]), p)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    n = x.numel()
    if n > 1000:  # five standard deviations
        assert abs(int(kept.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5


def test_neighbours_rows_and_seeds_are_independent(dropped):
    n, p = 1 << 20, 0.3
    masks = [(dropped(torch.ones(n), torch.tensor([seed]), p) != 0).float() for seed in (1, 2)]
    for a, b in (
        masks,
        (masks[0][1:], masks[0][:-1]),
        (masks[0][4096:], masks[0][:-4096]),
        (masks[0][8:], masks[0][:-8]),
    ):
        covariance = ((a - a.mean()) * (b - b.mean())).mean() / (p * (1 - p))
        assert abs(float(covariance)) < 5 / n**0.5


def test_its_gradient_has_the_same_mask():
    x = torch.randn(50, 300, requires_grad=True)
    y = ops.dropout(x, 0.4)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient * x, y)
    assert 0.35 < float((gradient == 0).float().mean()) < 0.45


def test_it_follows_torchs_own_seed():
    x, outputs = torch.ones(1000), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ops.dropout(x, 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_opcheck():
    x = torch.randn(5, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.gmm_jepa.dropout.default, (x, torch.tensor([3]), 0.2))


@pytest.mark.parametrize("form", [ops.dropout, hashed_dropout])
def test_one_graph_with_its_gradient(form):
    """Compiled, the gradient still has the mask of the output."""
    compiled = torch.compile(lambda x: form(2 * x, 0.4), fullgraph=True, backend="aot_eager")
    x = (1 + torch.rand(50, 300)).requires_grad_()
    y = compiled(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert 0.35 < float((y == 0).float().mean()) < 0.45
    torch.testing.assert_close(gradient * x, y)
    torch.testing.assert_close(y[y != 0], (2 * x / 0.6)[y != 0])
