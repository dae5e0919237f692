"""The Triton kernel takes the place of the plain-torch log-mel on CUDA.

Triton is imported when the op first runs on a CUDA tensor. Where it is absent, and for float64,
the plain-torch implementation that defines the op stays; so does its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.fused import has_triton
from gmm_jepa.ops.log_mel import _log_mel, log_mel_reference

_COVERED = (torch.float32, torch.bfloat16, torch.float16, torch.int16)
_COVERED_OUT = (torch.float32, torch.bfloat16, torch.float16)


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
    if waveform.dtype not in _COVERED or out_dtype not in _COVERED_OUT:
        return log_mel_reference(waveform, lengths_samples, window, filters, hop, floor, out_dtype)
    from gmm_jepa.kernels import log_mel as kernel

    return kernel.log_mel(
        waveform, lengths_samples, window, filters, hop=hop, floor=floor, out_dtype=out_dtype
    )


if has_triton:
    _log_mel.register_kernel("cuda")(log_mel)
