"""The conformer encoder: strided front end, conformer blocks, layer aggregation.

Frame-major (B, T, D) throughout. Padding never changes a result: every row's output equals that
of the row alone and unpadded, to rounding. See `gmm_jepa.models.padding`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.attention import GatedRelativeBias, attention, gated_bias_attention
from gmm_jepa.models.config import AGGREGATION_HEADS, ConformerConfig
from gmm_jepa.models.convolution import DepthwiseConv
from gmm_jepa.models.dropout import Dropout
from gmm_jepa.models.encoder import Encoder, last_layer
from gmm_jepa.models.frontend import FrontEnd
from gmm_jepa.models.linear import Linear
from gmm_jepa.models.padding import (
    FrameGroupNorm,
    FrameMask,
    mean_over_frames,
    zero_padding,
)


class FeedForward(nn.Module):
    """Linear to 4 D, GELU, dropout, linear back, dropout."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.up = Linear(dim, 4 * dim)
        self.down = Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x (..., D) and `scale` times what the layers make of it: (..., D)."""
        if ops.takes_block(x):
            weights = (p for layer in (self.up, self.down) for p in (layer.weight, layer.bias))
            return ops.feed_forward(x, *weights, scale=scale, dropout_p=self.dropout.rate)
        return x + scale * self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class SelfAttention(nn.Module):
    """Multi-head attention with its residual; the position bias, if any, is handed in."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GatedRelativeBias | None,
        table: Tensor | None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `table` is ``bias.table(T)``, made once for all blocks."""
        dropout_p = self.dropout if self.training else 0.0
        if bias is None or table is None:
            return x + self._composed(x, mask, None, None, dropout_p)
        if ops.takes_block(x, n_heads=self.heads):
            qkv, out = self.qkv, self.out
            gates = (bias.gate_u, bias.gate_r, bias.scale)
            weights = ops.AttentionWeights(
                qkv.weight, qkv.bias, out.weight, out.bias, table, *gates
            )
            lengths = None if mask is None else mask.lengths
            return ops.self_attention(x, weights, lengths_frames=lengths, dropout_p=dropout_p)
        return x + self._composed(x, mask, bias, table, dropout_p)

    def _composed(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GatedRelativeBias | None,
        table: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        options = {
            "key_lengths": None if mask is None else mask.lengths.clamp(min=1),
            "dropout_p": dropout_p,
        }
        if bias is None or table is None:
            y = attention(q, k, v, **options)
        else:
            y = gated_bias_attention(q, k, v, table, bias.gate(q), **options)
        return self.out(y.transpose(1, 2).flatten(2))


class ConvolutionModule(nn.Module):
    """Norm, pointwise to 2 D, GLU, depthwise, norm, SiLU, pointwise, dropout; with its residual.

    The norms are group norms of one group.
    """

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = FrameGroupNorm(dim)
        self.up = Linear(dim, 2 * dim)
        self.depthwise = DepthwiseConv(dim, kernel)
        self.norm_out = FrameGroupNorm(dim)
        self.down = Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """(B, T, D) and what the layers make of it: (B, T, D)."""
        if ops.takes_block(x):
            layers = (self.norm_in, self.up, self.depthwise, self.norm_out, self.down)
            weights = (p for layer in layers for p in (layer.weight, layer.bias))
            return ops.convolution_module(
                x,
                ops.ConvolutionWeights(*weights),
                epsilon=self.norm_in.eps,
                lengths_frames=None if mask is None else mask.lengths,
                dropout_p=self.dropout.rate,
            )
        y = F.glu(self.up(self.norm_in(x, mask)), dim=-1)
        y = self.depthwise(zero_padding(y, mask))
        return x + self.dropout(self.down(F.silu(self.norm_out(y, mask))))


class ConformerBlock(nn.Module):
    """s += FF1(s) / 2; s += attention(s); s += convolution(s); s += FF2(s) / 2."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, dropout = config.code_dim, config.dropout
        self.ff1 = FeedForward(dim, dropout)
        self.attention = SelfAttention(dim, config.heads, dropout)
        self.convolution = ConvolutionModule(dim, config.conv_kernel, dropout)
        self.ff2 = FeedForward(dim, dropout)

    def forward(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GatedRelativeBias | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) with zero padding."""
        x = self.ff1(x, 0.5)
        x = self.attention(x, mask, bias, table)
        x = self.convolution(x, mask)
        return zero_padding(self.ff2(x, 0.5), mask)


class LayerAggregation(nn.Module):
    """Attention of the last layer's time-pooled vector over all layers': one weight a layer.

    Checkpoints hold a value and an output projection that nothing uses. They are kept, so that
    checkpoints come back whole, as parameters without gradient: DDP and optimisers then pass
    them over, while as buffers DDP would broadcast them at every step.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim).requires_grad_(False)
        self.out_proj = Linear(dim, dim).requires_grad_(False)

    def forward(self, layers: tuple[Tensor, ...], mask: FrameMask | None) -> tuple[Tensor, Tensor]:
        """Layers, each (B, T, D) with zero padding -> weighted sum (B, T, D), weights (B, L)."""
        pooled = torch.stack([mean_over_frames(layer, mask) for layer in layers], dim=1)
        heads = (AGGREGATION_HEADS, -1)
        q = self.q_proj(pooled[:, -1]).unflatten(-1, heads)  # (B, 4, d)
        k = self.k_proj(pooled).unflatten(-1, heads)  # (B, L, 4, d)
        scores = (k * q[:, None]).sum(dim=-1).float() * q.shape[-1] ** -0.5  # (B, L, 4)
        weights = scores.softmax(dim=1).mean(dim=-1)
        total = torch.zeros_like(layers[0])
        for layer, weight in zip(layers, weights.to(layers[0].dtype).unbind(dim=1)):
            total = torch.addcmul(total, layer, weight[:, None, None])
        return total, weights


class ConformerEncoder(Encoder[ConformerConfig]):
    """Strided front end, conformer blocks, layer aggregation."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__(config)
        self.front_end = FrontEnd(config)
        self.relative_bias = (
            GatedRelativeBias(
                config.heads,
                config.code_dim // config.heads,
                n_buckets=config.n_buckets,
                max_distance=config.max_distance,
            )
            if config.relative_bias
            else None
        )
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.layers))
        self.aggregation = self.dropout = None
        if config.aggregation == "attention":
            self.aggregation = LayerAggregation(config.code_dim)
        else:  # as the published WavLM-style model has it
            self.dropout = Dropout(config.dropout)

    def blocks_of(self, x: Tensor, mask: FrameMask | None) -> list[Tensor]:
        """Frames (B, T, D) with zero padding -> the output of every block, the same."""
        return super().blocks_of(x if self.dropout is None else self.dropout(x), mask)

    def combine(self, layers: tuple[Tensor, ...], mask: FrameMask | None) -> tuple[Tensor, Tensor]:
        """Layers, each (B, T, D) -> output (B, T, D) and the layers' weights (B, L)."""
        return last_layer(layers) if self.aggregation is None else self.aggregation(layers, mask)
