"""Lengths of the rows of padded batches, as ops take them."""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.errors import InputError


def check_lengths(lengths_frames: Tensor | None, x: Tensor) -> None:
    """Raise InputError unless there is one integer a row of x (B, T, C), on its device."""
    if lengths_frames is None:
        return
    if lengths_frames.shape != x.shape[:1] or lengths_frames.is_floating_point():
        found = f"{lengths_frames.dtype} {tuple(lengths_frames.shape)}"
        raise InputError(f"lengths_frames: expected integers ({len(x)},), got {found}")
    if lengths_frames.device != x.device:
        raise InputError(f"lengths_frames: on {lengths_frames.device}, but x on {x.device}")


def real_frames(lengths_frames: Tensor, x: Tensor) -> Tensor:
    """(B, T, 1) for x (B, T, C), of its type: one on real frames and zero on padding."""
    frames = torch.arange(x.shape[1], device=x.device)
    return (frames < lengths_frames[:, None])[..., None].to(x.dtype)
