"""The snake activation, y = x + sin(a x)^2 / a, with one a for each channel (arXiv 2006.08195).

On a CPU one pass over x forward and one back, where torch makes six and eight. Sines are taken of
the product a x in float64, so the distance to the next multiple of pi has all of float32's digits.
On CUDA the result keeps x's dtype, and so do memory's reads and writes; it is rounded once.
"""

from __future__ import annotations

from torch import Tensor

from gmm_jepa.ops.checks import check_sequence, check_shapes
from gmm_jepa.ops.fused import takes_kernel
from gmm_jepa.ops.lengths import check_lengths, real_frames
from gmm_jepa.ops.operator import Operator


def snake(x: Tensor, a: Tensor, *, lengths_frames: Tensor | None = None) -> Tensor:
    """x + sin(a x)^2 / a on real frames, zero on padding.

    Args:
        x: (B, T, C) float.
        a: (C,) float, positive; its type is that of all arithmetic.
        lengths_frames: (B,) int64, real frames of each row; None: all.

    Returns:
        (B, T, C) of a's dtype; where a kernel takes x (`takes_kernel`), of x's.

    Raises:
        InputError: shapes or devices do not fit.
    """
    check_sequence(x)
    check_shapes(x, ("a",), (a,), (x.shape[2:],))
    check_lengths(lengths_frames, x)
    return (_snake_narrow if takes_kernel(x) else _snake)(x, a, lengths_frames)


def snake_reference(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """`snake` in plain torch."""
    wide = x.to(a.dtype)
    y = wide + (a * wide).sin().square() / a
    y = y if lengths_frames is None else y * real_frames(lengths_frames, y)
    return y.contiguous()


def snake_narrow_reference(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """`snake` in plain torch, rounded to x's dtype."""
    return snake_reference(x, a, lengths_frames).to(x.dtype)


def snake_backward_reference(
    grad: Tensor, x: Tensor, a: Tensor, lengths_frames: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (of its own type) and a, in plain torch."""
    wide = x.to(a.dtype)
    grad = grad if lengths_frames is None else grad * real_frames(lengths_frames, grad)
    double_sine = (2 * a * wide).sin()
    of_a = grad * (double_sine * wide - (a * wide).sin().square() / a) / a
    d_x = grad * (1 + double_sine)
    return d_x.to(x.dtype).contiguous(), of_a.sum(dim=(0, 1))


_snake = Operator("gmm_jepa::snake", snake_reference)
_snake_narrow = Operator("gmm_jepa::snake_narrow", snake_narrow_reference)
_snake_backward = Operator("gmm_jepa::snake_backward", snake_backward_reference)


@_snake.register_fake
def _(x, a, lengths_frames):
    return x.new_empty(x.shape, dtype=a.dtype)


@_snake_narrow.register_fake
def _(x, a, lengths_frames):
    return x.new_empty(x.shape)


@_snake_backward.register_fake
def _(grad, x, a, lengths_frames):
    return x.new_empty(x.shape), a.new_empty(a.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _vjp(ctx, grad):
    return *_snake_backward(grad, *ctx.saved_tensors), None


_snake.register_autograd(_vjp, setup_context=_setup)
_snake_narrow.register_autograd(_vjp, setup_context=_setup)
