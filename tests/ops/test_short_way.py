"""The package's operators give the same bits past the dispatcher as through it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gmm_jepa.ops.attention import _attention
from gmm_jepa.ops.convolution_module import _convolution_module
from gmm_jepa.ops.density import _density_attention
from gmm_jepa.ops.depthwise import _depthwise
from gmm_jepa.ops.dropout import _dropout
from gmm_jepa.ops.em import _em_statistics, _kmeans_assign, _kmeans_statistics
from gmm_jepa.ops.feed_forward import _feed_forward
from gmm_jepa.ops.linear import _linear
from gmm_jepa.ops.log_mel import _log_mel
from gmm_jepa.ops.operator import Operator
from gmm_jepa.ops.posterior import _log_likelihood, _posterior, _topk
from gmm_jepa.ops.residual import _unit
from gmm_jepa.ops.residual_block import _block
from gmm_jepa.ops.self_attention import _self_attention
from gmm_jepa.ops.snake import _snake, _snake_narrow
from gmm_jepa.ops.strided import _strided
from gmm_jepa.ops.waveform import _waveform_conv
from tests.scaled_map import WAYS, leaves_of, scaled_map


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _frozen(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [leaf.detach() for leaf in _draw(*shapes)]


def _of_convolution_module() -> list:
    shapes = ((32,), (32,), (64, 32), (64,), (32, 1, 5), (32,), (32,), (32,), (32, 32), (32,))
    return [*_draw((2, 9, 32), *shapes), torch.tensor([9, 4]), torch.tensor([3]), 1e-5, 0.2, False]


def _of_self_attention() -> list:
    shapes = ((96, 32), (96,), (32, 32), (32,), (2, 17), (2, 16), (2, 16), (2,))
    return [*_draw((2, 9, 32), *shapes), torch.tensor([9, 4]), torch.tensor([3]), 0.2, False]


def _of_unit() -> list:
    tensors = _draw((2, 9, 16), (16, 16, 3), (16,), (16, 16, 3), (16,))
    return [*tensors, torch.tensor([9, 4]), 3, True, False]


OPERATORS: dict[str, tuple[Operator, Callable[[], list]]] = {
    "of these tests": (scaled_map, lambda: [*leaves_of(), 0.5]),
    "without an optional tensor": (scaled_map, lambda: [*leaves_of()[:2], None, 0.5]),
    "attention": (
        _attention,
        lambda: [*_draw(*[(2, 2, 9, 16)] * 3, (2, 17), (2, 2, 9)), None, None, 0.0],
    ),
    "convolution module": (_convolution_module, _of_convolution_module),
    "density attention": (
        _density_attention,
        lambda: [*_draw((2, 20, 16), (4, 4)), torch.ones(4, 4, requires_grad=True), None],
    ),
    "depthwise": (_depthwise, lambda: _draw((2, 9, 16), (16, 1, 3), (16,))),
    "feed-forward": (
        _feed_forward,
        lambda: [
            *_draw((2, 9, 32), (64, 32), (64,), (32, 64), (32,), (32,), (32,)),
            *(torch.tensor([3]), 0.5, 1e-5, 0.2, True, False),
        ],
    ),
    "linear": (_linear, lambda: _draw((18, 16), (8, 16), (8,))),
    "residual unit": (_unit, _of_unit),
    "self-attention": (_self_attention, _of_self_attention),
    "snake": (_snake, lambda: [*_draw((2, 9, 16), (16,)), torch.tensor([9, 4])]),
}
# Of the mixture's, of K = 4, D = 16: parameters have no gradient.
MIXTURE = (torch.zeros(4), torch.randn(4, 16, generator=torch.Generator().manual_seed(2)))
MIXTURE = (*MIXTURE, torch.ones(4, 16))
OPERATORS |= {
    "dropout": (_dropout, lambda: [*_draw((9, 16)), torch.tensor([3]), 0.2]),
    "EM": (_em_statistics, lambda: [*_frozen((9, 16)), *MIXTURE]),
    "k-means": (_kmeans_statistics, lambda: [*_frozen((9, 16)), MIXTURE[1]]),
    "log-likelihood": (_log_likelihood, lambda: [*_draw((9, 16)), *MIXTURE, "exact"]),
    "log-mel": (
        _log_mel,
        lambda: [
            *_draw((2, 900)),
            *(torch.tensor([900, 400]), torch.hann_window(400), torch.rand(201, 8) + 0.1),
            *(160, 1e-6, torch.float32),
        ],
    ),
    "nearest centroids": (_kmeans_assign, lambda: [*_frozen((9, 16)), MIXTURE[1]]),
    "posterior": (
        _posterior,
        lambda: [*_draw((9, 16)), *MIXTURE, 1.0, False, "fast", torch.float32],
    ),
    "posterior, logarithm": (
        _posterior,
        lambda: [*_draw((9, 16)), *MIXTURE, 1.0, True, "fast", torch.float32],
    ),
    "residual units": (
        _block,
        lambda: [
            *_draw((2, 9, 16), (2, 16, 16, 3), (2, 16), (2, 16, 16, 3), (2, 16)),
            *(torch.tensor([9, 4]), [1, 3], False),
        ],
    ),
    "snake of 16 bits": (_snake_narrow, lambda: [*_draw((2, 9, 16), (16,)), None]),
    "strided": (_strided, lambda: [*_draw((2, 12, 16), (32, 16, 4), (32,)), 2, False]),
    "topk": (_topk, lambda: [*_frozen((9, 16)), *MIXTURE, 2, 1.0]),
    "waveform": (
        _waveform_conv,
        lambda: [*_draw((2, 40), (16, 8), (16,), (2, 2, 16)), torch.tensor([4, 2]), 4],
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_short_way_is_as_the_long_one(name, way):
    op, make = OPERATORS[name]
    results = []
    for call in (op, op._op):
        arguments = make()
        with WAYS[way]():
            out = call(*arguments)
        out = (out,) if isinstance(out, Tensor) else out
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        grads = ()
        if out[0].requires_grad:
            cotangent = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(out[0], leaves, cotangent.to(out[0].dtype))
        assert (len(grads) == len(leaves)) == (not leaves or way in ("plain", "autocast"))
        flags = [(t.requires_grad, t.is_leaf, t.is_inference(), t.stride()) for t in out]
        results.append((flags, [*out, *grads]))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_no_bit_of_float32(name):
    """Nor reaches into the plain torch that a kernel may fall back on."""
    op, make = OPERATORS[name]
    expected = op(*make())
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*make())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_all_operators_are_tried():
    modules = [m for name, m in sys.modules.items() if name.startswith("gmm_jepa.ops.")]
    found = {o for m in modules for o in vars(m).values() if isinstance(o, Operator)}
    tried = {op for op, _ in OPERATORS.values()}
    assert {op._name for op in found - tried if not op._name.endswith("_backward")} == set()
