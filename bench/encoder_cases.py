"""The encoder's operators as measured: forward and gradient, beside plain torch.

Shapes are those of the default conformer: on CPUs units, snake and DAAM of its first stage (64
channels, 2,000 frames a second), on CUDA those of all three under autocast, as layers, the second
stage's strided convolution, attention of its blocks (32 heads of 16, 50 frames a second) and their
depthwise convolution (512 channels, 31 taps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import floors
from bench.cases import Case, Run, short_name, worst
from bench.shapes import Shape
from gmm_jepa import ops
from gmm_jepa.models.attention import attention_with_bias
from gmm_jepa.models.daam import DensityAttention
from gmm_jepa.models.frontend import ResidualBlock, Snake
from gmm_jepa.ops import fused
from gmm_jepa.ops.density import density_attention_reference
from gmm_jepa.ops.residual import SLOPE
from gmm_jepa.ops.snake import snake_reference


class Stage(NamedTuple):
    """What a strided convolution leaves."""

    channels: int
    hop_samples: int


STAGES = (Stage(64, 8), Stage(128, 64), Stage(256, 320))
(CHANNELS, HOP_SAMPLES), DILATION = STAGES[0], 9
HEADS, HEAD_DIM = 32, 16
TAPS = 31
DROPOUT = 0.1


def _through(function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Run:
    """Forward and all gradients."""
    return lambda: torch.autograd.grad(function(), leaves, grad)


def _error(run: Run, peer: Run, allowed: float) -> float:
    """Largest difference of two sides' gradients, of the largest value, over what is allowed."""
    pairs = zip(run(), peer(), strict=True)
    return worst((a - b).abs().max() / b.abs().max() for a, b in pairs) / allowed


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest distance of two sides' gradients, relative to the norm of the expected one."""
    pairs = zip(found, expected, strict=True)
    return worst((a - b).norm() / b.norm() for a, b in pairs)


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
        # Gradients of the weights and biases. A value within rounding of the kink may fall on
        # either side of it, and among 61 million some do: their frames' shares of a gradient were
        # 2e-3 of its largest value, which the norm hardly sees.
        lambda: worst(
            (
                _distance(run()[1:], by_torch()[1:]) / 1e-3,
                _error(lambda: run()[1:], lambda: by_torch()[1:], 1e-2),
            )
        ),
        floors.residual_unit(B * T, C),
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
        floors.density_attention(B * T, C),
        "float32",
    )


def snake(shape: Shape, device: str) -> Case:
    """Against its plain form."""
    B, T, C = shape.rows, shape.samples // HOP_SAMPLES, CHANNELS
    leaves = _leaves(torch.randn(B, T, C, device=device), 0.5 + torch.rand(C, device=device))
    grad = torch.randn(B, T, C, device=device)
    run = _through(lambda: ops.snake(*leaves), leaves, grad)
    peer = _through(lambda: snake_reference(*leaves, None), leaves, grad)
    return Case(
        "snake + gradient",
        "f32",
        run,
        {"torch": peer},
        lambda: _error(run, peer, 1e-3),
        _work_of_snake(B * T * C, 4),
        "float32",
    )


def _work_of_snake(n_values: int, value_bytes: int) -> floors.Work:
    """About 20 and 30 operations a value; x and y, then x, the gradient and that of x."""
    return floors.Work(50.0 * n_values, 5.0 * value_bytes * n_values)


def layer(
    name: str, shape: Shape, device: str, stage: Stage, module: nn.Module, *, products: str
) -> Case:
    """A layer of a front end's stage under autocast to bfloat16, against its composed form.

    A residual block also against the other schedules of its kernels.
    """
    B, T, C = shape.rows, shape.samples // stage.hop_samples, stage.channels
    module, dtype = module.to(device), torch.bfloat16
    x, grad = (torch.randn(B, T, C, device=device, dtype=dtype) for _ in range(2))
    leaves = (x.requires_grad_(), *module.parameters())

    def run() -> list[Tensor]:
        with torch.autocast(device, dtype):
            out = module(x, None)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def composed() -> list[Tensor]:
        with fused.composed():
            return run()

    def error() -> float:
        """By the root of the mean square, of 5 %: values near a kink may be rounded across it."""
        found, expected = ([t.detach().float() for t in side()] for side in (run, composed))
        return _distance(found, expected) / 0.05

    peers: dict[str, Run] = {"torch": composed}
    if isinstance(module, ResidualBlock):
        least = floors.residual_unit(B * T, C)
        work = floors.Work(least.flops, least.bytes * dtype.itemsize / 4)
        peers |= _other_schedules(run, C)
    elif isinstance(module, DensityAttention):
        least = floors.density_attention(B * T, C)
        work = floors.Work(least.flops, least.bytes * dtype.itemsize / 4)
    else:
        work = _work_of_snake(B * T * C, dtype.itemsize)
    name = f"{name} C={C} + gradient"
    return Case(name, short_name(dtype), run, peers, error, work, products)


def _other_schedules(run: Run, channels: int) -> dict[str, Run]:
    from gmm_jepa.kernels import residual_unit as kernel

    def by(schedule: str) -> Run:
        def scheduled() -> object:
            before, kernel.SCHEDULE = kernel.SCHEDULE, schedule
            try:
                return run()
            finally:
                kernel.SCHEDULE = before

        return scheduled

    if not kernel.is_narrow(channels):
        return {}
    return {name: by(name) for name in kernel.SCHEDULES if name != kernel.SCHEDULE}


def residual_layer(shape: Shape, device: str, stage: Stage, dilation: int) -> Case:
    """One unit, of a block of one dilation."""
    block = ResidualBlock(stage.channels, (dilation,))
    name = f"residual_unit d={dilation}"
    return layer(name, shape, device, stage, block, products="bfloat16")


def snake_layer(shape: Shape, device: str, stage: Stage) -> Case:
    """With the softplus of its parameter."""
    return layer("snake", shape, device, stage, Snake(stage.channels), products="float32")


def density_layer(shape: Shape, device: str, stage: Stage) -> Case:
    """With the squares of its widths."""
    return layer("density_attention", shape, device, stage, DensityAttention(), products="float32")


def strided_conv(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
    """The second stage's, from the first's frames, against torch's own convolution and gradient."""
    before, after = STAGES[:2]
    stride = after.hop_samples // before.hop_samples
    B, T, C, out = shape.rows, shape.samples // before.hop_samples, before.channels, after.channels
    x, weight, bias = leaves = _leaves(
        torch.randn(B, T, C, device=device, dtype=dtype),
        torch.randn(out, C, 2 * stride, device=device, dtype=dtype) / (2 * stride * C) ** 0.5,
        torch.zeros(out, device=device, dtype=dtype),
    )

    def peer() -> Tensor:
        images, filters = x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2)
        y = F.conv2d(images, filters, bias, stride=(1, stride), padding=(0, stride // 2))
        return y.squeeze(2).transpose(1, 2)

    grad = torch.randn_like(peer())
    run = _through(lambda: ops.strided_conv(*leaves, stride), leaves, grad)
    by_torch = _through(peer, leaves, grad)
    n_in, n_out = B * T * C, grad.numel()
    # three products; x and y, then x, the gradient and that of x
    values = dtype.itemsize * (3.0 * n_in + 2.0 * n_out)
    work = floors.Work(3 * 2.0 * n_out * 2 * stride * C, values)
    single = "tf32" if device == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"
    allowed = 1e-3 if dtype == torch.float32 and single == "float32" else 5e-2
    return Case(
        "strided_conv + gradient",
        short_name(dtype),
        run,
        {"torch": by_torch},
        lambda: _error(run, by_torch, allowed),
        work,
        single if dtype == torch.float32 else "bfloat16",
    )


def linear(shape: Shape, device: str) -> Case:
    """Of a feed-forward module, from the blocks' width to four times that, against torch's."""
    N, K = shape.rows * shape.samples // 320, shape.channels
    leaves = _leaves(
        torch.randn(N, K, device=device),
        torch.randn(4 * K, K, device=device) / K**0.5,
        torch.zeros(4 * K, device=device),
    )
    grad = torch.randn(N, 4 * K, device=device)
    run = _through(lambda: ops.linear(*leaves), leaves, grad)
    peer = _through(lambda: F.linear(*leaves), leaves, grad)
    # three products; each of the three matrices is read twice and the first two's gradients written
    work = floors.Work(3 * 2.0 * N * K * 4 * K, 4.0 * (3 * N * K + 3 * 4 * K * K + 2 * N * 4 * K))
    return Case(
        "linear + gradient",
        "f32",
        run,
        {"torch": peer},
        lambda: _error(run, peer, 1e-3),
        work,
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

    def check() -> float:
        exact = _error(side(ours, 0.0), side(peer, 0.0), allowed)
        return worst((exact, _dropout_error(leaves, dropout_p))) if dropout_p else exact

    products = "bfloat16"
    if dtype == torch.float32:
        products = "tf32 in three" if device == "cuda" else "float32"
    return Case(
        f"gated_bias_attention{', dropout' if dropout_p else ''} + gradient",
        short_name(dtype),
        side(ours, dropout_p),
        {"torch": side(peer, dropout_p)},
        check,
        floors.attention(B, HEADS, T, HEAD_DIM, value_bytes=dtype.itemsize),
        products,
    )


def _dropout_error(leaves: Sequence[Tensor], probability: float) -> float:
    """What is left of each softmax's weights, which is one in the mean, in five standard errors."""
    q, k, v, *bias = (leaf.detach() for leaf in leaves)
    kept = ops.gated_bias_attention(q, k, torch.ones_like(v), *bias, dropout_p=probability)
    kept = kept[..., 0].double()
    if not kept.std() > 1e-2:  # nothing was dropped
        return math.inf
    return float((kept.mean() - 1.0).abs() / (5 * kept.std() / kept.numel() ** 0.5))


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
    work = floors.Work(3 * 2.0 * TAPS * B * T * C, 5.0 * dtype.itemsize * B * T * C)
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
        """Share of zeros in the gradient, in five standard deviations, and what the rest is."""
        (gradient,), y = run(), ops.dropout(x.detach(), DROPOUT)
        dropped = float((gradient == 0).double().mean())
        share = abs(dropped - DROPOUT) / (5 * (DROPOUT * (1 - DROPOUT) / x.numel()) ** 0.5)
        kept, scaled = y != 0, x.detach() / (1 - DROPOUT)
        off = [gradient[gradient != 0] * (1 - DROPOUT) - 1, (y - scaled)[kept]]
        return worst((share, *(o.abs().max() / 1e-5 for o in off)))

    return Case(
        "dropout + gradient",
        "f32",
        run,
        {"torch": _through(lambda: F.dropout(x, DROPOUT), leaves, grad)},
        check,
        floors.dropout(x.numel()),
        "float32",
    )
