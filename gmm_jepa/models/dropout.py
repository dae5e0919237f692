"""Dropout as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from gmm_jepa import ops


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `gmm_jepa.ops.dropout`."""

    @property
    def rate(self) -> float:
        """Probability that a value is dropped now: none but in training."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x, or in training x dropped out."""
        return ops.dropout(x, self.p) if self.training else x
