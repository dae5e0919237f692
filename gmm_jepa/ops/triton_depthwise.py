"""The Triton kernels take the place of the plain-torch depthwise convolution on CUDA.

Triton is imported when the op first runs on a CUDA tensor. Where it is absent, for float64, and for
more than 63 taps, the plain-torch implementation that defines the op stays.
"""

from __future__ import annotations

from torch import Tensor

from gmm_jepa.ops import depthwise, fused

_MOST_TAPS = 63


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the op `gmm_jepa::depthwise_conv`."""
    if not _covered(x, weight):
        return depthwise.depthwise_reference(x, weight, bias)
    from gmm_jepa.kernels import depthwise_conv as kernel

    return kernel.depthwise_conv(x, weight, bias)


def depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::depthwise_conv_backward`."""
    if not _covered(x, weight):
        return depthwise.depthwise_backward_reference(grad, x, weight, with_bias)
    from gmm_jepa.kernels import depthwise_conv as kernel

    return kernel.depthwise_conv_backward(grad, x, weight, with_bias)


def _covered(x: Tensor, weight: Tensor) -> bool:
    return fused.covers(x, weight) and weight.shape[-1] <= _MOST_TAPS


if fused.has_triton:
    depthwise._depthwise.register_kernel("cuda")(depthwise_conv)
    depthwise._depthwise_backward.register_kernel("cuda")(depthwise_conv_backward)
