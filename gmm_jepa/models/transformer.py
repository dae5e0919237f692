"""The transformer encoder: strided convolutions, pre-norm blocks, one gated position bias.

Frame-major (B, T, D). Padding never changes a result, see `gmm_jepa.models.padding`: convolutions
have none of their own, so a real frame sees real samples only; norms, the attention's keys and the
average behind the gate take real frames alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.attention import RelativeBias, attention, gated_bias_attention
from gmm_jepa.models.convolution import FrameConv
from gmm_jepa.models.dropout import Dropout
from gmm_jepa.models.encoder import Encoder, last_layer
from gmm_jepa.models.frontend import to_unit_rms
from gmm_jepa.models.layer_norm import LayerNorm
from gmm_jepa.models.padding import (
    Count,
    FrameGroupNorm,
    FrameMask,
    conv_length,
    frame_mask,
    mean_over_frames,
    valid_frames,
    zero_padding,
)

KERNELS = (10, 3, 3, 3, 3, 3, 3)
STRIDES = (5, 2, 2, 2, 2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and switches of the transformer encoder; defaults as published.

    Raises:
        InputError: a size is out of range, or two sizes do not fit each other.
    """

    conv_dim: int = 512
    """Channels of the seven convolutions."""
    code_dim: int = 768
    """Width of the frames, D."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads of every block."""
    ffn_dim: int = 3072
    """Width of the feed-forward layers."""
    relative_bias: bool = True
    """Gated relative position bias, shared by all blocks."""
    n_buckets: int = 320
    """Buckets of the relative position bias, both directions together (a multiple of 4)."""
    max_distance: int = 800
    """Distance in frames from which all keys on one side share a bucket."""
    dropout: float = 0.1
    """Dropout probability everywhere."""
    unit_rms: bool = False
    """Divide every utterance by its RMS before the first convolution (published: off)."""

    def __post_init__(self) -> None:
        for name in ("conv_dim", "code_dim", "layers", "heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.code_dim % self.heads:
            raise InputError(
                f"code_dim: expected a multiple of heads = {self.heads}, got {self.code_dim}"
            )
        if self.n_buckets < 4 or self.n_buckets % 4:
            raise InputError(f"n_buckets: expected 4, 8, ..., got {self.n_buckets}")
        if self.max_distance <= self.n_buckets // 4:
            raise InputError(
                f"max_distance: expected more than n_buckets / 4 = {self.n_buckets // 4}, "
                f"got {self.max_distance}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return prod(STRIDES)

    @property
    def frame_centre_samples(self) -> float:
        """Sample on which frame 0 is centred, by stride and kernel arithmetic."""
        centre, hop = 0.0, 1
        for kernel, stride in zip(KERNELS, STRIDES):
            centre += hop * (kernel - 1) / 2
            hop *= stride
        return centre

    def n_frames(self, n_samples: Count) -> Count:
        """Frames made of so many samples (an int, or an integer tensor)."""
        for kernel, stride in zip(KERNELS, STRIDES):
            n_samples = conv_length(n_samples, kernel, stride=stride)
        return n_samples


class ConvolutionStack(nn.Module):
    """Seven strided convolutions, each with GroupNorm (one group) and GELU; then the projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.unit_rms = config.unit_rms
        channels = [1] + [config.conv_dim] * len(KERNELS)
        self.convolutions = nn.ModuleList(
            FrameConv(c_in, c_out, kernel, stride=stride, bias=False)
            for c_in, c_out, kernel, stride in zip(channels, channels[1:], KERNELS, STRIDES)
        )
        self.norms = nn.ModuleList(FrameGroupNorm(config.conv_dim) for _ in KERNELS)
        self.projection = nn.Linear(config.conv_dim, config.code_dim)
        self.norm = LayerNorm(config.code_dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, waveform: Tensor, lengths_samples: Tensor | None
    ) -> tuple[Tensor, FrameMask | None]:
        """Waveform (B, S) -> frames (B, T, D), padding zero, and their mask.

        Under autocast the frames, and with them the residual stream of the blocks above, stay in
        the parameters' float32.
        """
        mask = None
        if lengths_samples is not None:
            real = valid_frames(lengths_samples, waveform.shape[1])
            waveform = waveform.masked_fill(~real, 0)
            mask = frame_mask(lengths_samples, waveform.shape[1])
        if self.unit_rms:
            waveform = to_unit_rms(waveform, lengths_samples)
        x = waveform[..., None]
        for convolution, norm in zip(self.convolutions, self.norms):
            x = convolution(x)
            if mask is not None:
                kernel, stride = convolution.weight.shape[-1], convolution.stride
                mask = frame_mask(conv_length(mask.lengths, kernel, stride=stride), x.shape[1])
            x = zero_padding(F.gelu(norm(x, mask)), mask)
        frames = self.norm(self.projection(x).to(self.projection.weight.dtype))
        return zero_padding(self.dropout(frames), mask), mask


class GlobalGatedBias(RelativeBias):
    """bias[b, h, i, j] = table[h, j - i] * gate[b, h]: one gate for all of an utterance.

    With g the unscaled queries' mean over frames and heads, r = sigmoid(gate_r[h] . g) and
    u = sigmoid(gate_u[h] . g), gate = 1 + u s_h r.
    """

    def __init__(self, heads: int, head_dim: int, *, n_buckets: int, max_distance: int) -> None:
        super().__init__(heads, n_buckets=n_buckets, max_distance=max_distance)
        self.gate_r = nn.Linear(head_dim, heads, bias=False)
        self.gate_u = nn.Linear(head_dim, heads, bias=False)
        self.scale = nn.Parameter(torch.ones(heads))

    def gate(self, q: Tensor, mask: FrameMask | None) -> Tensor:
        """(B, H, T, d) unscaled queries -> (B, H, T) gates, equal over T."""
        mean = mean_over_frames(zero_padding(q.mean(dim=1), mask), mask)  # (B, d)
        gate = 1 + self.gate_u(mean).sigmoid() * self.scale * self.gate_r(mean).sigmoid()
        return gate[..., None].expand(-1, -1, q.shape[2])


class TransformerBlock(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.code_dim
        self.heads, self.attention_dropout = config.heads, config.dropout
        self.attention_norm = LayerNorm(D)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.out_proj = nn.Linear(D, D)
        self.ffn_norm = LayerNorm(D)
        self.up, self.down = nn.Linear(D, config.ffn_dim), nn.Linear(config.ffn_dim, D)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GlobalGatedBias | None,
        table: Tensor | None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) with zero padding; `table` is ``bias.table(T)``."""
        x = x + self.dropout(self.out_proj(self._attend(self.attention_norm(x), mask, bias, table)))
        if ops.takes_block(x, hidden=len(self.up.bias)):
            layers = (self.up, self.down, self.ffn_norm)
            tensors = (p for layer in layers for p in (layer.weight, layer.bias))
            options = {"epsilon": self.ffn_norm.eps, "dropout_p": self.dropout.rate}
            return zero_padding(ops.feed_forward(x, *tensors, **options), mask)
        y = self.down(self.dropout(F.gelu(self.up(self.ffn_norm(x)))))
        return zero_padding(x + self.dropout(y), mask)

    def _attend(
        self,
        x: Tensor,
        mask: FrameMask | None,
        bias: GlobalGatedBias | None,
        table: Tensor | None,
    ) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        options = {
            "key_lengths": None if mask is None else mask.lengths.clamp(min=1),
            "dropout_p": self.attention_dropout if self.training else 0.0,
        }
        if bias is None or table is None:
            y = attention(q, k, v, **options)
        else:
            y = gated_bias_attention(q, k, v, table, bias.gate(q, mask), **options)
        return y.transpose(1, 2).flatten(2)


class TransformerEncoder(Encoder[TransformerConfig]):
    """Convolutions, transformer blocks; the output is the last block's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.front_end = ConvolutionStack(config)
        self.relative_bias = (
            GlobalGatedBias(
                config.heads,
                config.code_dim // config.heads,
                n_buckets=config.n_buckets,
                max_distance=config.max_distance,
            )
            if config.relative_bias
            else None
        )
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))

    def combine(self, layers: tuple[Tensor, ...], mask: FrameMask | None) -> tuple[Tensor, Tensor]:
        """The last layer (B, T, D), and one-hot weights (B, L)."""
        return last_layer(layers)
