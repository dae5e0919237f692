"""The Triton kernels take the place of the plain-torch DAAM and snake on CUDA.

They do where `fused.uses_unproven` is set; Triton is imported when an op first runs on a CUDA
tensor then. Where it is absent, and for float64, the plain-torch implementations that define the
ops stay.
"""

from __future__ import annotations

from torch import Tensor

from gmm_jepa.ops import density
from gmm_jepa.ops.fused import covers, has_triton, where_unproven
from gmm_jepa.ops.snake import (
    _snake_backward,
    _snake_narrow,
    snake_backward_reference,
    snake_narrow_reference,
)


def density_attention(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
) -> Tensor:
    """As the op `gmm_jepa::density_attention`."""
    if not covers(x, offsets, squared_widths):
        return density.density_attention_reference(x, offsets, squared_widths, lengths_frames)
    from gmm_jepa.kernels import density_attention as kernel

    return kernel.density_attention(x, offsets, squared_widths, lengths_frames)


def density_attention_backward(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    squared_widths: Tensor,
    lengths_frames: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::density_attention_backward`."""
    inputs = (grad, x, offsets, squared_widths)
    if not covers(*inputs):
        return density.density_attention_backward_reference(*inputs, lengths_frames)
    from gmm_jepa.kernels import density_attention_backward as kernel

    return kernel.density_attention_backward(*inputs, lengths_frames)


def snake_narrow(x: Tensor, a: Tensor, lengths_frames: Tensor | None) -> Tensor:
    """As the op `gmm_jepa::snake_narrow`."""
    if not covers(x, a):
        return snake_narrow_reference(x, a, lengths_frames)
    from gmm_jepa.kernels import snake as kernel

    return kernel.snake(x, a, lengths_frames)


def snake_backward(
    grad: Tensor, x: Tensor, a: Tensor, lengths_frames: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the op `gmm_jepa::snake_backward`."""
    if not covers(grad, x, a):
        return snake_backward_reference(grad, x, a, lengths_frames)
    from gmm_jepa.kernels import snake as kernel

    return kernel.snake_backward(grad, x, a, lengths_frames)


if has_triton:
    for _op, _kernel, _reference in (
        (density._density_attention, density_attention, density.density_attention_reference),
        (
            density._density_attention_backward,
            density_attention_backward,
            density.density_attention_backward_reference,
        ),
        (_snake_narrow, snake_narrow, snake_narrow_reference),
        (_snake_backward, snake_backward, snake_backward_reference),
    ):
        _op.register_kernel("cuda")(where_unproven(_kernel, _reference))
