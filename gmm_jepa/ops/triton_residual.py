"""The Triton kernels take the place of the plain-torch residual unit on CUDA, for 16-bit values.

They do where `fused.uses_unproven` is set; Triton is imported when the op first runs on a CUDA
tensor then. Where it is absent, for float32 and float64, and for channels that are no multiple of
16 or more than 512, the plain-torch implementation that defines the op stays.
"""

from __future__ import annotations

from torch import Tensor, bfloat16, float16

from gmm_jepa.ops import fused, residual

_MOST_CHANNELS = 512


def takes_16_bits(x: Tensor) -> bool:
    """Whether a residual unit's kernels take x; `fused.takes_kernel` says where."""
    return fused.takes_kernel(x) and _is_for_kernels(x)


def residual_unit(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
    keep_hidden: bool,
    narrow: bool,
) -> tuple[Tensor, Tensor]:
    """As the op `gmm_jepa::residual_unit`; the hidden values are kept after their leaky ReLU."""
    inputs = (x, weight1, bias1, weight2, bias2, lengths_frames, dilation)
    if not _covered(x):
        return residual.residual_unit_reference(*inputs, keep_hidden, narrow)
    from gmm_jepa.kernels import residual_unit as kernel

    out, hidden = kernel.residual_unit(*inputs)
    return out, hidden if keep_hidden else x.new_empty(0)


def residual_unit_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    lengths_frames: Tensor | None,
    dilation: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::residual_unit_backward`, of the hidden values kept here."""
    inputs = (grad, x, hidden, weight1, bias1, weight2, bias2, lengths_frames, dilation)
    if not _covered(x):
        return residual.residual_unit_backward_reference(*inputs, narrow)
    from gmm_jepa.kernels import residual_unit_backward as kernel

    return kernel.residual_unit_backward(*inputs)


def _is_for_kernels(x: Tensor) -> bool:
    C = x.shape[2]
    return x.dtype in (bfloat16, float16) and C % 16 == 0 and 0 < C <= _MOST_CHANNELS


def _covered(x: Tensor) -> bool:
    """And a row's values are numbered in 32 bits, with room for the taps."""
    return _is_for_kernels(x) and x.shape[1] * x.shape[2] < 2**30


if fused.has_triton:
    residual._unit.register_kernel("cuda")(
        fused.where_unproven(residual_unit, residual.residual_unit_reference)
    )
    residual._unit_backward.register_kernel("cuda")(
        fused.where_unproven(residual_unit_backward, residual.residual_unit_backward_reference)
    )
