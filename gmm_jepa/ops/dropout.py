"""Dropout whose mask is a function of few numbers, so that none need be stored for a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.checks import check_probability
from gmm_jepa.ops.fused import takes_float32
from gmm_jepa.ops.operator import Operator


def dropout(x: Tensor, p: float) -> Tensor:
    """x with values zero with probability p and the others times 1 / (1 - p).

    On CPUs one pass that draws, where torch has three and keeps a mask. On a GPU torch's own, but
    `hashed_dropout` in compiled code: the generator that the compiler writes out for every value
    made of GELU and dropout, 32 x 750 x 2,048 bf16 on an H200, 0.215 ms, four times what memory
    takes.

    Args:
        x: any shape, float.
        p: at least 0 and below 1.

    Raises:
        InputError: p is out of its range.
    """
    check_probability("p", p)
    if x.device.type == "cuda" and torch.compiler.is_dynamo_compiling() and x.numel() < 1 << 31:
        return hashed_dropout(x, p) if p else x
    if not takes_float32(x):
        return torch.nn.functional.dropout(x, p)
    return _dropout(x.float(), drawn_seed(p), p).to(x.dtype) if p else x


def drawn_seed(p: float, device: torch.device | str = "cpu") -> Tensor | None:
    """(1,) int64 by torch's own generator, which masks are drawn from; None without any."""
    return torch.randint(1 << 62, (1,), device=device) if p else None


def hashed_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout by operations that a compiler fuses with others and repeats for the gradient.

    A value is kept where a hash of its number and of two random words of 24 bits, two rounds of
    multiplying and shifting as in the attention's kernels, reaches p of 2^32.
    """
    words = (torch.rand(2, device=x.device) * (1 << 24)).int()
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = h + (words[0] << 8)
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF) ^ words[1] << 8) * (0x846CA68B - (1 << 32))
    return torch.where(h >= round(p * (1 << 32)) - (1 << 31), x / (1.0 - p), 0.0)


def dropout_reference(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """`dropout` with the mask of a seed (1,), in plain torch; a gradient takes the same way."""
    if seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(int(seed))
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return (x * keep / (1.0 - p)).contiguous()


_dropout = Operator("gmm_jepa::dropout", dropout_reference)


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
