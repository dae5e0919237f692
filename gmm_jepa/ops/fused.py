"""Where one operator of a CPU does what elsewhere a model composes of plain torch.

On other devices a compiler fuses the plain form; without the native module it is the faster one;
an exported graph holds no ops of this package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

has_native = False
"""Set where the native module registers its kernels."""

_composes = False


def exporting() -> bool:
    """Whether a graph is exported, which may hold no op of this package.

    While `torch.compile` traces, PyTorch 2.11 says so of itself, too; hence the second question.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def takes_one_op(x: Tensor) -> bool:
    """Whether x is on a CPU with native kernels, and neither export nor `composed` is under way."""
    return has_native and x.device.type == "cpu" and not (_composes or exporting())


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """Compose on CPUs, too: what a model does and keeps for the gradient is then as elsewhere."""
    global _composes
    before, _composes = _composes, True
    try:
        yield
    finally:
        _composes = before
