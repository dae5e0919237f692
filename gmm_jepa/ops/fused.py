"""Which of several forms of one thing a device takes: the models do not ask for devices.

Where a CPU has one operator, other devices compose plain torch, which a compiler fuses, or take one
whose kernel is Triton's; without the native module or Triton the composed form is the faster one.
An exported graph holds no ops of this package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gmm_jepa.ops.native import instruction_sets, multiplies_bfloat16

has_native = bool(instruction_sets())
"""Whether the native module registers its kernels."""

has_triton = importlib.util.find_spec("triton") is not None

uses_unproven = os.environ.get("GMM_JEPA_UNPROVEN_KERNELS") == "1"
"""Whether ops take, on CUDA, kernels that have run under Triton's interpreter alone: those of
residual units, snake and density-adaptive attention. Otherwise models compose, and the ops
themselves are plain torch. The environment is read once, when this is imported."""

WIDE_DILATION = 16
"""Six calls of the kernel that cuDNN falls back on, `conv2d_grouped_direct`, took 112 of the 269 ms
of a compiled training step on an H200; the calls that its fast kernels lack are those of dilations
25, 27 and 125. Without a dilation not measured yet. oneDNN has fast kernels for all."""

AMX_CHANNELS = 16
"""Fewer than these go wrong: `takes_wide`."""

MAP_MULTIPLE = 32
"""Sizes of linear maps that the native module takes."""

MOST_SEEN = 1 << 21
"""Values that all frames of a strided convolution see together, counted with those seen twice."""

RUN_MULTIPLE = 16
"""Widths that fill its vectors, of an attention's heads and of a strided convolution's input."""

_composes = False


def exporting() -> bool:
    """Whether a graph is exported, which may hold no op of this package.

    While `torch.compile` traces, PyTorch 2.11 says so of itself, too; hence the second question.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def takes_one_op(x: Tensor) -> bool:
    """Whether x is on a CPU with native kernels, and neither export nor `composed` is under way."""
    return has_native and x.device.type == "cpu" and not (_composes or exporting())


def takes_float32(x: Tensor) -> bool:
    """`takes_one_op`, by an op that gives float32: x is that already, or autocast wants bfloat16.

    What follows under autocast narrows its own operands; kept wide in between they cost nothing.
    """
    if not takes_one_op(x):
        return False
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu") == torch.bfloat16
        return narrow and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32


def allows_narrow(x: Tensor) -> bool:
    """Whether autocast lets an op of x, anything but float64, multiply bfloat16."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return False
    return torch.get_autocast_dtype(kind) == torch.bfloat16


def takes_block(x: Tensor, *, hidden: int = MAP_MULTIPLE, n_heads: int = 1) -> bool:
    """Whether a block's linear maps of x go into one op with what lies between them.

    On a CPU whose processor multiplies bfloat16, under autocast to it. In float32 torch's products
    are the faster ones (792 x 128 to 512 and back, one Xeon: the op took 1.2 times as long).

    Args:
        x: (..., D) that is mapped.
        hidden: width that it is mapped to.
        n_heads: that D is split into, if it is.
    """
    D = x.shape[-1]
    fits = D % MAP_MULTIPLE == hidden % MAP_MULTIPLE == D % (n_heads * RUN_MULTIPLE) == 0
    return fits and x.dtype == torch.float32 and x.numel() > 0 and _narrows(x)


def _narrows(x: Tensor) -> bool:
    """Whether ops that give float32 take x and multiply bfloat16."""
    return takes_float32(x) and torch.is_autocast_enabled("cpu") and multiplies_bfloat16()


KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of what Triton kernels read and write: all that float32 holds."""


def covers(*tensors: Tensor) -> bool:
    """Whether Triton kernels are made for such types."""
    return all(t.dtype in KERNEL_TYPES for t in tensors)


def where_unproven(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` while `uses_unproven` is set, else `reference`, both of an op's arguments."""

    def chosen(*arguments: Any) -> Any:
        return (kernel if uses_unproven else reference)(*arguments)

    return chosen


def takes_kernel(x: Tensor) -> bool:
    """Whether an op takes a Triton kernel for x where devices else compose plain torch.

    On CUDA, with Triton there, and neither export nor `composed` under way.
    """
    if not (has_triton and uses_unproven and x.device.type == "cuda"):
        return False
    return covers(x) and not (_composes or exporting())


def takes_phases(x: Tensor, dilation: int) -> bool:
    """Whether a convolution of x is to run on frames a dilation apart as neighbours."""
    return x.device.type == "cuda" and dilation >= WIDE_DILATION and not exporting()


def takes_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x in bfloat16 must be one in float32: on a CPU, of few channels.

    oneDNN 3.10 on processors with AMX: with 4 to 15 channels and 8, 12, 16 ... taps the results are
    unrelated to the inputs (relative error 1; `test_bfloat16_of_few_channels`). Other processors
    take the same form: of so few channels the results are to be the same everywhere.
    """
    if x.device.type != "cpu" or weight.shape[1] >= AMX_CHANNELS or x.dtype == torch.float64:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def takes_products(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a strided convolution of x (B, T, C) is to be, or to have, a matrix product.

    On CUDA for its gradient of x. On a CPU whose processor multiplies bfloat16, under autocast to
    it, while what the frames see stays in cache: two cores of one Xeon, with the gradients,
    8 x 500 x 32 to 64 channels, stride 5, 0.76 of oneDNN's time, 4 x 8,000 x 64 to 128, stride 8,
    1.8 times.
    """
    if exporting():
        return False
    if x.device.type == "cuda":
        return True
    seen = x.shape[0] * (x.shape[1] // stride) * weight[0].numel()
    fits = weight[0].numel() % MAP_MULTIPLE == weight.shape[0] % MAP_MULTIPLE == 0
    fits = fits and x.shape[2] % RUN_MULTIPLE == 0
    return fits and 0 < seen <= MOST_SEEN and _narrows(x)


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """Compose on CPUs, too: what a model does and keeps for the gradient is then as elsewhere."""
    global _composes
    before, _composes = _composes, True
    try:
        yield
    finally:
        _composes = before
