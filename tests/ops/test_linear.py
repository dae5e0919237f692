"""Linear maps by oneDNN and in plain torch against float64."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from gmm_jepa import ops
from gmm_jepa.errors import InputError

module = sys.modules["gmm_jepa.ops.linear"]  # whose name in the package is the op's

# shape of x, M
CASES = {
    "frames": ((3, 33, 48), 80),
    "rows": ((7, 5), 3),
    "one row": ((1, 16), 16),
    "a vector": ((17,), 4),
    "one column in": ((5, 1), 9),
    "one column out": ((2, 5, 9), 1),
    "prime sizes": ((101, 37), 53),
    "many rows": ((2, 1500, 64), 64),
    "wide": ((4, 2048), 512),
    "no rows": ((0, 6, 8), 4),
    "no frames": ((2, 0, 8), 4),
}


@pytest.fixture(params=["oneDNN", "torch"])
def form(request, monkeypatch):
    if request.param == "oneDNN" and not module._has_onednn:
        pytest.skip("no AVX-512")
    monkeypatch.setattr(module, "_has_fast_product", request.param == "oneDNN")
    return request.param


def case(name: str) -> list[Tensor]:
    shape, M = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (M, shape[-1]), (M,))
    return [torch.randn(size, generator=generator) for size in sizes]


def results_of(function, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, form):
    leaves = case(name)
    expected = results_of(torch.nn.functional.linear, [leaf.double() for leaf in leaves])
    peer = results_of(torch.nn.functional.linear, leaves)
    for a, p, e in zip(results_of(ops.linear, leaves), peer, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == torch.float32
        if e.numel():
            scale, error, of_peer = (float(t.detach().abs().max()) for t in (e, a - e, p - e))
            assert error <= 2 * of_peer + 1e-6 * scale


def test_strides_are_taken_as_they_are(form):
    x, weight, bias = case("prime sizes")
    turned = x.T.contiguous().T, weight.T.contiguous().T, bias
    torch.testing.assert_close(ops.linear(*turned), ops.linear(x, weight, bias))


def test_float64_is_kept():
    leaves = [leaf.double() for leaf in case("rows")]
    torch.testing.assert_close(ops.linear(*leaves), torch.nn.functional.linear(*leaves))


def test_autocast_is_left_to_torch():
    x, weight, _ = case("rows")
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.takes_linear(x, weight)
    assert not ops.takes_linear(x.double(), weight.double())


def test_opcheck():
    leaves = [leaf.requires_grad_() for leaf in case("prime sizes")]
    torch.library.opcheck(torch.ops.gmm_jepa.linear.default, leaves)


def test_refusals():
    x, weight, bias = case("rows")
    with pytest.raises(InputError, match="weight: expected"):
        ops.linear(x, weight.T, bias)
    with pytest.raises(InputError, match="bias: expected"):
        ops.linear(x, weight, bias[:2])


def test_autocast_leaves_the_operator_wide(form):
    leaves = case("frames")
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = results_of(ops.linear, leaves)
    assert {t.dtype for t in (out, *gradients)} == {torch.float32}
    torch.testing.assert_close(out, torch.nn.functional.linear(*leaves))
