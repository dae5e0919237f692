"""The Triton kernel takes the place of the plain-torch log-mel on CUDA.

Triton is imported when the op first runs on a CUDA tensor. Where it is absent, and for float64,
the plain-torch implementation that defines the op stays; so does its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.fused import KERNEL_TYPES, has_triton
from gmm_jepa.ops.log_mel import _log_mel, log_mel_reference


def log_mel(
    waveform: Tensor,
    lengths_samples: Tensor,
    window: Tensor,
    filters: Tensor,
    hop: int,
    floor: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """As the op `gmm_jepa::log_mel`."""
    if waveform.dtype not in (*KERNEL_TYPES, torch.int16) or out_dtype not in KERNEL_TYPES:
        return log_mel_reference(waveform, lengths_samples, window, filters, hop, floor, out_dtype)
    from gmm_jepa.kernels import log_mel as kernel

    return kernel.log_mel(
        waveform, lengths_samples, window, filters, hop=hop, floor=floor, out_dtype=out_dtype
    )


if has_triton:
    _log_mel.register_kernel("cuda")(log_mel)
