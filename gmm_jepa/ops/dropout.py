"""Dropout whose mask is a function of one number, so that none is stored for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.ops.fused import takes_float32


def dropout(x: Tensor, p: float) -> Tensor:
    """x with values zero with probability p and the others times 1 / (1 - p).

    On CPUs one pass that draws, where torch has three and keeps a mask; elsewhere torch's own.

    Args:
        x: any shape, float.
        p: at least 0 and below 1.

    Raises:
        InputError: p is out of its range.
    """
    if not 0.0 <= p < 1.0:
        raise InputError(f"p: expected at least 0 and below 1, got {p}")
    if not takes_float32(x):
        return torch.nn.functional.dropout(x, p)
    return _dropout(x.float(), torch.randint(1 << 62, (1,)), p).to(x.dtype) if p else x


def dropout_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """`dropout` with the mask of a seed (1,), in plain torch; a gradient takes the same way."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return (x * keep / (1.0 - p)).contiguous()


_dropout = torch.library.custom_op("gmm_jepa::dropout", dropout_reference, mutates_args=())


@_dropout.register_fake
def _(x, seed, p):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _vjp(ctx, grad):
    (seed,) = ctx.saved_tensors
    return _dropout(grad, seed, ctx.p), None, None


_dropout.register_autograd(_vjp, setup_context=_setup)
