"""An operator of the tests' own, and ways of calling one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from gmm_jepa.ops.operator import Operator

NAME = "gmm_jepa_tests::scaled_map"


def scaled_map_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Scale (x^2 weight + bias), and x^2."""
    square = x.square()
    y = scale * square @ weight
    return (y if bias is None else y + scale * bias), square


def scaled_map_backward_reference(
    grad: Tensor, x: Tensor, square: Tensor, weight: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return 2 * scale * x * (grad @ weight.T), scale * square.T @ grad, scale * grad.sum(0)


scaled_map = Operator(NAME, scaled_map_reference)
scaled_map_backward = Operator(f"{NAME}_backward", scaled_map_backward_reference)
scaled_map.register_kernel("cpu")(scaled_map_reference)
scaled_map_backward.register_kernel("cpu")(scaled_map_backward_reference)


@scaled_map.register_fake
def _(x, weight, bias, scale):
    return x.new_empty(len(x), weight.shape[1]), torch.empty_like(x)


@scaled_map_backward.register_fake
def _(grad, x, square, weight, scale):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[1])


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.scale = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)


def _vjp(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    d_x, d_weight, d_bias = scaled_map_backward(grad, *ctx.saved_tensors, ctx.scale)
    return d_x, d_weight, d_bias if ctx.has_bias else None, None


scaled_map.register_autograd(_vjp, setup_context=_setup)
scaled_map.register_autocast("cpu", torch.float32)

WAYS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def leaves_of(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((5, 4), (4, 3), (3,))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
