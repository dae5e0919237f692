"""The Triton kernels take the place of the plain-torch gated-bias attention on CUDA.

Triton is imported when the op first runs on a CUDA tensor. Where it is absent, for float64, and for
heads wider than 128, the plain-torch implementation that defines the op stays.
"""

from __future__ import annotations

from torch import Tensor

from gmm_jepa.ops import attention, fused

_WIDEST_HEAD = 128


def gated_bias_attention(q: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """As the op `gmm_jepa::gated_bias_attention`."""
    if not _covered(q):
        return attention.attention_reference(q, *others)
    from gmm_jepa.kernels import gated_bias_attention as kernel

    return kernel.gated_bias_attention(q, *others)


def gated_bias_attention_backward(
    grad: Tensor, out: Tensor, log_sum: Tensor, q: Tensor, *others: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op `gmm_jepa::gated_bias_attention_backward`."""
    if not _covered(q):
        return attention.attention_backward_reference(grad, out, log_sum, q, *others)
    from gmm_jepa.kernels import gated_bias_attention_backward as kernel

    return kernel.gated_bias_attention_backward(grad, out, log_sum, q, *others)


def _covered(q: Tensor) -> bool:
    return fused.covers(q) and q.shape[3] <= _WIDEST_HEAD


if fused.has_triton:
    attention._attention.register_kernel("cuda")(gated_bias_attention)
    attention._attention_backward.register_kernel("cuda")(gated_bias_attention_backward)
