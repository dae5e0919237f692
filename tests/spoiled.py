"""Results that begin as NaN, so that what a kernel forgets to write shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

MOST_VALUES = 1 << 26
"""Larger ones are there for their addresses, most of which nobody touches."""


@pytest.fixture(autouse=True)
def outputs_begin_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests of a folder whose conftest.py imports it."""
    new_empty, empty_like, empty = Tensor.new_empty, torch.empty_like, torch.empty

    def spoiled(tensor: Tensor) -> Tensor:
        if tensor.numel() <= MOST_VALUES:
            tensor.detach().fill_(math.nan if tensor.is_floating_point() else -1)
        return tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: spoiled(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoiled(empty_like(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoiled(empty(*a, **k)))
