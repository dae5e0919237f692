"""What sits on the encoder during pretraining: cluster head and predictor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.attention import GatedRelativeBias
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerBlock
from gmm_jepa.models.dropout import Dropout
from gmm_jepa.models.layer_norm import LayerNorm
from gmm_jepa.models.linear import Linear
from gmm_jepa.models.padding import FrameMask, at_least_float32, zero_padding
from gmm_jepa.models.transformer import TransformerConfig


class ClusterBlock(nn.Module):
    """x += dropout(linear(dropout(gelu(linear(norm(x))))))."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.up = Linear(dim, dim)
        self.down = Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        if ops.takes_block(x):
            layers = (self.up, self.down, self.norm)
            tensors = (p for layer in layers for p in (layer.weight, layer.bias))
            options = {"epsilon": self.norm.eps, "dropout_p": self.dropout.rate}
            return ops.feed_forward(x, *tensors, **options)
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(x))))))


class ClusterHead(nn.Module):
    """Frames to logits of K clusters through three residual blocks of width 2 D."""

    def __init__(self, code_dim: int, n_clusters: int, dropout: float = 0.1) -> None:
        super().__init__()
        width = 2 * code_dim
        self.in_proj = Linear(code_dim, width)
        self.in_norm = LayerNorm(width)
        self.blocks = nn.ModuleList(ClusterBlock(width, dropout) for _ in range(3))
        self.out_norm = LayerNorm(width)
        self.out_proj = Linear(width, n_clusters)

    def forward(self, z: Tensor) -> Tensor:
        """Frames (..., D) -> logits (..., K); each frame for itself."""
        x = F.gelu(self.in_norm(self.in_proj(z)))
        if torch.is_autocast_enabled(x.device.type):
            x = at_least_float32(x)  # on CUDA it is already
        for block in self.blocks:
            x = block(x)
        return self.out_proj(self.out_norm(x))


def build_predictor(config: ConformerConfig | TransformerConfig) -> nn.Module:
    """The published predictor over an encoder of this config."""
    kind = FramePredictor if isinstance(config, TransformerConfig) else Predictor
    return kind(config)


class FramePredictor(nn.Module):
    """Linear, GELU, linear, each frame for itself: the published one over the transformer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.in_proj = Linear(config.code_dim, config.code_dim)
        self.out_proj = Linear(config.code_dim, config.code_dim)

    def forward(self, z: Tensor, mask: FrameMask | None, bias: nn.Module | None) -> Tensor:
        """(B, T, D) -> (B, T, D) with zero padding; no attention, so `bias` is not used."""
        return zero_padding(self.out_proj(F.gelu(self.in_proj(z))).to(z.dtype), mask)


class Predictor(nn.Module):
    """Linear, GELU, conformer block, linear: from masked frames to the teacher's."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.in_proj = Linear(config.code_dim, config.code_dim)
        self.block = ConformerBlock(config)
        self.out_proj = Linear(config.code_dim, config.code_dim)

    def forward(self, z: Tensor, mask: FrameMask | None, bias: GatedRelativeBias | None) -> Tensor:
        """(B, T, D) -> (B, T, D) with zero padding; `bias` is the online encoder's own."""
        table = None if bias is None else bias.table(z.shape[1])
        x = self.block(F.gelu(self.in_proj(z).to(z.dtype)), mask, bias, table)
        return zero_padding(self.out_proj(x).to(z.dtype), mask)
