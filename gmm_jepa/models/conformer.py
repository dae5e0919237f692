"""The conformer encoder: strided front end, conformer blocks, layer aggregation.

Frame-major (B, T, D) throughout. Padding never changes a result: every row's output equals that
of the row alone and unpadded, to rounding. See `gmm_jepa.models.padding`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa.errors import InputError
from gmm_jepa.models.attention import GatedRelativeBias, attention, gated_bias_attention
from gmm_jepa.models.config import AGGREGATION_HEADS, ConformerConfig
from gmm_jepa.models.convolution import FrameConv
from gmm_jepa.models.frontend import FrontEnd
from gmm_jepa.models.padding import (
    Count,
    FrameGroupNorm,
    FrameMask,
    mean_over_frames,
    zero_padding,
)


class EncoderOutput(NamedTuple):
    """What an encoder makes of a batch of B waveforms; frames past a row's length are zero."""

    output: Tensor
    """(B, T, D), the weighted sum of the layers, z."""
    layers: tuple[Tensor, ...]
    """The projection's output and every block's, each (B, T, D)."""
    layer_weights: Tensor
    """(B, len(layers)), rows sum to one."""
    lengths_frames: Tensor
    """(B,) int64, real frames of each row."""


class FeedForward(nn.Module):
    """Linear to 4 D, GELU, dropout, linear back, dropout."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class SelfAttention(nn.Module):
    """Multi-head attention whose position bias, if any, is handed in."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GatedRelativeBias | None,
        table: Tensor | None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `table` is ``bias.table(T)``, made once for all blocks."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        options = {
            "key_lengths": None if mask is None else mask.lengths.clamp(min=1),
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if bias is None or table is None:
            y = attention(q, k, v, **options)
        else:
            y = gated_bias_attention(q, k, v, table, bias.gate(q), **options)
        return self.out(y.transpose(1, 2).flatten(2))


class ConvolutionModule(nn.Module):
    """GroupNorm, pointwise to 2 D, GLU, depthwise, GroupNorm, SiLU, pointwise, dropout."""

    def __init__(self, dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = FrameGroupNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.depthwise = FrameConv(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm_out = FrameGroupNorm(dim)
        self.down = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = F.glu(self.up(self.norm_in(x, mask)), dim=-1)
        x = self.depthwise(zero_padding(x, mask))
        return self.dropout(self.down(F.silu(self.norm_out(x, mask))))


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
        x = x + 0.5 * self.ff1(x)
        x = x + self.attention(x, mask, bias, table)
        x = x + self.convolution(x, mask)
        return zero_padding(x + 0.5 * self.ff2(x), mask)


class LayerAggregation(nn.Module):
    """Attention of the last layer's time-pooled vector over all layers': one weight a layer.

    Checkpoints hold a value and an output projection that nothing uses. They are kept, so that
    checkpoints come back whole, as parameters without gradient: DDP and optimisers then pass
    them over, while as buffers DDP would broadcast them at every step.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim).requires_grad_(False)
        self.out_proj = nn.Linear(dim, dim).requires_grad_(False)

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


class ConformerEncoder(nn.Module):
    """Waveform to frames of width ``config.code_dim``, one every ``hop_samples``."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
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
        self.aggregation = LayerAggregation(config.code_dim)

    @property
    def hop_samples(self) -> int:
        """Samples from one frame's centre to the next."""
        return self.config.hop_samples

    @property
    def frame_centre_samples(self) -> float:
        """Sample on which frame 0 is centred, by stride and padding arithmetic."""
        return self.config.frame_centre_samples

    def n_frames(self, n_samples: Count) -> Count:
        """Frames made of so many samples (an int, or an integer tensor)."""
        return self.config.n_frames(n_samples)

    def forward(self, waveform: Tensor, lengths_samples: Tensor | None = None) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            waveform: (B, S) float, in [-1, 1]. Padding may hold anything, even NaN.
            lengths_samples: (B,) integer, real samples of each row, 0 to S; None says that all
                are real and takes the faster path without masks.

        Raises:
            InputError: shapes do not fit.
        """
        _check_batch(waveform, lengths_samples)
        if lengths_samples is not None:
            lengths_samples = lengths_samples.to(waveform.device, torch.int64)
        n_frames = self.n_frames(waveform.shape[1])
        if n_frames == 0:  # shorter than one frame: run one frame of padding, return none
            lengths_samples = waveform.new_zeros(len(waveform), dtype=torch.int64)
            waveform = F.pad(waveform, (0, 2 * self.hop_samples - waveform.shape[1]))
        x, mask = self.front_end(waveform, lengths_samples)
        bias = self.relative_bias
        table = None if bias is None else bias.table(x.shape[1])
        layers = [x]
        for block in self.blocks:
            x = block(x, mask, bias, table)
            layers.append(x)
        output, weights = self.aggregation(tuple(layers), mask)
        lengths = torch.full((len(x),), n_frames, device=x.device) if mask is None else mask.lengths
        return EncoderOutput(
            output[:, :n_frames], tuple(layer[:, :n_frames] for layer in layers), weights, lengths
        )


def _check_batch(waveform: Tensor, lengths_samples: Tensor | None) -> None:
    if waveform.dim() != 2 or not waveform.is_floating_point():
        raise InputError(
            f"waveform: expected a float tensor (batch, samples), "
            f"got {waveform.dtype} of shape {tuple(waveform.shape)}"
        )
    if lengths_samples is not None and lengths_samples.shape != waveform.shape[:1]:
        raise InputError(
            f"lengths_samples: expected one length a row, shape ({waveform.shape[0]},), "
            f"got {tuple(lengths_samples.shape)}"
        )
