"""Layer norm as a layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa.models.padding import at_least_float32


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that takes its scales as float32 where they are held as bfloat16.

    Sharded blocks have them so; a CPU refuses them beside float32 frames.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same shape."""
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
