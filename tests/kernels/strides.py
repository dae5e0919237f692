"""Tensors elsewhere and of another type, with the strides that they had."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to(device, dtype)`, which makes values dense that are not, of the same strides."""
    if not tensor.numel():
        return tensor.to(device, dtype)
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    memory = tensor.as_strided((extent,), (1,)).to(device, dtype)  # with what lies between
    return memory.as_strided(tensor.shape, tensor.stride())
