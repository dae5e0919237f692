"""The encoder's operators as measured: forward and gradient, beside plain torch.

Shapes are those of the default conformer: units and DAAM of its first stage (64 channels, 2,000
frames a second), attention of its blocks (32 heads of 16, 50 frames a second) and their depthwise
convolution (512 channels, 31 taps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Run, short_name
from bench.shapes import Shape
from gmm_jepa import flops, ops
from gmm_jepa.models.attention import attention_with_bias
from gmm_jepa.ops.density import density_attention_reference
from gmm_jepa.ops.residual import SLOPE

CHANNELS, HOP_SAMPLES, DILATION = 64, 8, 9
HEADS, HEAD_DIM = 32, 16
TAPS = 31
DROPOUT = 0.1


def _through(function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Run:
    """Forward and all gradients."""
    return lambda: torch.autograd.grad(function(), leaves, grad)


def _error(run: Run, peer: Run, allowed: float) -> float:
    """Largest difference of two sides' gradients, of the largest value, over what is allowed."""
    pairs = zip(run(), peer(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) / allowed


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def residual_unit(shape: Shape, device: str) -> Case:
    """Against the convolutions and activations one by one, channels first."""
    B, T, C = shape.rows, shape.samples // HOP_SAMPLES, CHANNELS
    weights = [torch.randn(C, C, 3, device=device) / (3 * C) ** 0.5 for _ in range(2)]
    biases = [torch.zeros(C, device=device) for _ in range(2)]
    x, w1, b1, w2, b2 = leaves = _leaves(
        torch.randn(B, T, C, device=device), weights[0], biases[0], weights[1], biases[1]
    )
    grad = torch.randn(B, T, C, device=device)
    x_first = x.detach().transpose(1, 2).contiguous().requires_grad_()

    def peer() -> Tensor:
        y = F.conv1d(F.leaky_relu(x_first, SLOPE), w1, b1, padding=DILATION, dilation=DILATION)
        return x_first + F.conv1d(F.leaky_relu(y, SLOPE), w2, b2, padding=1)

    run = _through(lambda: ops.residual_unit(*leaves, dilation=DILATION), leaves, grad)
    by_torch = _through(peer, [x_first, w1, b1, w2, b2], grad.transpose(1, 2).contiguous())
    return Case(
        "residual_unit + gradient",
        "f32",
        run,
        {"torch": by_torch},
        # gradients of the weights and biases; where a value is within rounding of the kink the
        # gradient of x differs
        lambda: _error(lambda: run()[1:], lambda: by_torch()[1:], 1e-3),
        flops.residual_unit(B * T, C),
        "float32",
    )


def density_attention(shape: Shape, device: str) -> Case:
    """Against its plain form."""
    B, T, C = shape.rows, shape.samples // HOP_SAMPLES, CHANNELS
    leaves = _leaves(
        torch.randn(B, T, C, device=device),
        torch.zeros(4, 4, device=device),
        (0.3 + torch.rand(4, 4, device=device)),
    )
    grad = torch.randn(B, T, C, device=device)
    run = _through(lambda: ops.density_attention(*leaves), leaves, grad)
    peer = _through(lambda: density_attention_reference(*leaves, None), leaves, grad)
    return Case(
        "density_attention + gradient",
        "f32",
        run,
        {"torch": peer},
        lambda: _error(run, peer, 1e-3),
        flops.density_attention(B * T, C),
        "float32",
    )


def gated_bias_attention(
    shape: Shape, device: str, dtype: torch.dtype = torch.float32, dropout_p: float = 0.0
) -> Case:
    """Against torch's own attention with the bias written out."""
    B, T = shape.rows, shape.samples // 320
    size = (B, HEADS, T, HEAD_DIM)
    leaves = _leaves(
        *(torch.randn(size, device=device, dtype=dtype) for _ in range(3)),
        torch.randn(HEADS, 2 * T - 1, device=device),
        torch.rand(B, HEADS, T, device=device),
    )
    grad = torch.randn(size, device=device, dtype=dtype)

    def side(form: Callable[..., Tensor], probability: float) -> Run:
        return _through(lambda: form(*leaves, dropout_p=probability), leaves, grad)

    ours, peer = ops.gated_bias_attention, attention_with_bias
    allowed = 1e-3 if dtype == torch.float32 else 5e-2
    return Case(
        f"gated_bias_attention{', dropout' if dropout_p else ''} + gradient",
        short_name(dtype),
        side(ours, dropout_p),
        {"torch": side(peer, dropout_p)},
        lambda: _error(side(ours, 0.0), side(peer, 0.0), allowed),
        flops.attention(B, HEADS, T, HEAD_DIM, value_bytes=dtype.itemsize),
        "float32" if dtype == torch.float32 else "bfloat16",
    )


def attention_with_dropout(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """`gated_bias_attention` as in training."""
    return gated_bias_attention(shape, device, dtype, DROPOUT)


def depthwise_conv(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """Against torch's own, as the encoder ran it: two-dimensional and channels-last."""
    B, T, C = shape.rows, shape.samples // 320, shape.channels
    weight = torch.randn(C, 1, TAPS, device=device, dtype=dtype) / TAPS**0.5
    leaves = _leaves(
        torch.randn(B, T, C, device=device, dtype=dtype),
        weight,
        torch.zeros(C, device=device, dtype=dtype),
    )
    grad = torch.randn(B, T, C, device=device, dtype=dtype)

    def peer() -> Tensor:
        x, weight, bias = leaves
        images, filters = x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2)
        y = F.conv2d(images, filters, bias, padding=(0, TAPS // 2), groups=C)
        return y.squeeze(2).transpose(1, 2)

    run = _through(lambda: ops.depthwise_conv(*leaves), leaves, grad)
    by_torch = _through(peer, leaves, grad)
    # three passes of a multiply-add a tap; x and y, then x, the gradient and that of x
    work = flops.Work(3 * 2.0 * TAPS * B * T * C, 5.0 * dtype.itemsize * B * T * C)
    return Case(
        "depthwise_conv + gradient",
        short_name(dtype),
        run,
        {"torch": by_torch},
        lambda: _error(run, by_torch, 1e-3 if dtype == torch.float32 else 5e-2),
        work,
        "float32",
    )


def dropout(shape: Shape, device: str) -> Case:
    """Of the widest activation of a block, against torch's."""
    x = torch.randn(shape.rows * shape.samples // 320, 4 * shape.channels, device=device)
    (x,) = leaves = _leaves(x)
    grad = torch.ones_like(x)
    run = _through(lambda: ops.dropout(x, DROPOUT), leaves, grad)

    def check() -> float:
        """Share of zeros, in five standard deviations."""
        dropped = float((run()[0] == 0).double().mean())
        return abs(dropped - DROPOUT) / (5 * (DROPOUT * (1 - DROPOUT) / x.numel()) ** 0.5)

    return Case(
        "dropout + gradient",
        "f32",
        run,
        {"torch": _through(lambda: F.dropout(x, DROPOUT), leaves, grad)},
        check,
        flops.dropout(x.numel()),
        "float32",
    )
