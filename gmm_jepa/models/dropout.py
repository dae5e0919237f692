"""Dropout as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from gmm_jepa import ops


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `gmm_jepa.ops.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """x, or in training x dropped out."""
        return ops.dropout(x, self.p) if self.training else x
