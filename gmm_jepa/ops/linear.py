"""x W' + b in float32, by oneDNN on CPUs with AVX-512 that are not Intel's.

Torch hands float32 products to its BLAS, which may be MKL, and that does not use AVX-512 on AMD's
processors. 792 rows, 128 to 512 and back, one Zen 5 core: 115 GFLOP/s forward by torch, 255 by
oneDNN; with the gradient 2.9 against 1.4 ms. On an Intel Xeon oneDNN copies both operands of a
weight's gradient, and a step of the small conformer took 198 ms by it, 163 ms by MKL.
Compiled networks call the same entry.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.fused import takes_one_op
from gmm_jepa.ops.native import is_intel
from gmm_jepa.ops.operator import Operator, without_autocast

_has_onednn = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_has_fast_product = _has_onednn and not is_intel()


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is the way to go: float32 on a CPU as above, not under autocast."""
    wide = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return _has_fast_product and wide and takes_one_op(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W' + b, as `torch.nn.functional.linear`.

    Args:
        x: (..., K) float.
        weight: (M, K).
        bias: (M,)

    Returns:
        (..., M).

    Raises:
        InputError: shapes do not fit.
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"weight: expected (M, {tuple(x.shape)[-1:]}), got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise InputError(f"bias: expected {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _linear(rows, weight, bias).reshape(*x.shape[:-1], len(weight))


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` of (N, K) in plain torch."""
    return F.linear(x, weight, bias)


def linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in plain torch."""
    return grad @ weight, grad.T @ x, grad.sum(0)


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of (N, K) by oneDNN; any strides."""
    if not (_has_fast_product and x.numel() and weight.numel() and x.dtype == torch.float32):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_backward_onednn(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias by oneDNN."""
    return linear_onednn(grad, weight.T, None), linear_onednn(grad.T, x.T, None), grad.sum(0)


_linear = Operator("gmm_jepa::linear", linear_reference)
_linear_backward = Operator("gmm_jepa::linear_backward", linear_backward_reference)
_linear.register_kernel("cpu")(linear_onednn)
_linear_backward.register_kernel("cpu")(linear_backward_onednn)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@_linear_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(len(weight))


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _vjp(ctx, grad):
    return _linear_backward(grad, *ctx.saved_tensors)


_linear.register_autograd(_vjp, setup_context=_setup)
without_autocast(_linear, _linear_backward)
