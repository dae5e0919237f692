"""Linear maps as a layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` with a bias, by `gmm_jepa.ops.linear` where that is faster."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        form = ops.linear if ops.takes_linear(x, self.weight) else F.linear
        return form(x, self.weight, self.bias)
