"""From waveform to frames: the strided convolutional stages under the conformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.convolution import FrameConv, StridedConv
from gmm_jepa.models.daam import DensityAttention
from gmm_jepa.models.linear import Linear
from gmm_jepa.models.padding import (
    FrameMask,
    at_least_float32,
    frame_mask,
    stage_length,
    valid_frames,
    zero_padding,
)
from gmm_jepa.models.stem import stem
from gmm_jepa.ops.fused import takes_kernel
from gmm_jepa.ops.triton_residual import takes_16_bits


class Snake(nn.Module):
    """y = x + sin(a x)^2 / a with a = softplus(alpha) + 0.01 for every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """(B, T, C), finite -> the same with zero padding; float32 if `takes_float32` says so."""
        a = F.softplus(self.alpha) + 0.01
        if ops.takes_float32(x) or takes_kernel(x):
            return ops.snake(x, a.float(), lengths_frames=None if mask is None else mask.lengths)
        a = a.to(x.dtype)
        return zero_padding(x + (a * x).sin().square() / a, mask)


class ResidualBlock(nn.Module):
    """For each dilation d: x += conv_k3(lrelu(conv_k3,d(lrelu(x)))), slope 0.1."""

    def __init__(self, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(
            FrameConv(channels, channels, 3, padding=d, dilation=d) for d in dilations
        )
        self.plain = nn.ModuleList(FrameConv(channels, channels, 3, padding=1) for _ in dilations)

    def forward(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """(B, T, C) with zero padding -> the same."""
        dilations = [dilated.dilation for dilated in self.dilated]
        if ops.takes_residual_block(x, dilations):
            lengths = None if mask is None else mask.lengths
            stacked = (
                torch.stack([getattr(layer, name) for layer in layers])
                for layers in (self.dilated, self.plain)
                for name in ("weight", "bias")
            )
            return ops.residual_block(x, *stacked, dilations=dilations, lengths_frames=lengths)
        for dilated, plain in zip(self.dilated, self.plain):
            if ops.takes_float32(x) or takes_16_bits(x):
                x = ops.residual_unit(
                    x,
                    dilated.weight,
                    dilated.bias,
                    plain.weight,
                    plain.bias,
                    dilation=dilated.dilation,
                    lengths_frames=None if mask is None else mask.lengths,
                )
                continue
            y = zero_padding(dilated(F.leaky_relu(x, 0.1)), mask)
            y = plain(F.leaky_relu(y, 0.1))
            x = x + zero_padding(y, mask)
        return x


class Stage(nn.Module):
    """Strided convolution, snake, residual blocks and, if on, DAAM."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, blocks: int, daam: bool
    ):
        super().__init__()
        self.stride = stride
        self.conv = StridedConv(in_channels, out_channels, stride)
        self.snake = Snake(out_channels)
        self.residual = nn.ModuleList(
            ResidualBlock(out_channels, (1, 3**i, 5**i)) for i in range(blocks)
        )
        self.daam = DensityAttention() if daam else None

    def forward(self, x: Tensor, mask: FrameMask | None) -> tuple[Tensor, FrameMask | None]:
        """(B, T, C) with zero padding -> (B, T', C') with zero padding, and its mask."""
        if mask is not None:
            n_frames = stage_length(x.shape[1], self.stride)
            mask = frame_mask(stage_length(mask.lengths, self.stride), n_frames)
        return self.refine(self.conv(x), mask), mask

    def refine(self, x: Tensor, mask: FrameMask | None) -> Tensor:
        """What follows the strided convolution: (B, T, C) -> the same with zero padding."""
        x = self.snake(x, mask)
        for block in self.residual:
            x = block(x, mask)
        return x if self.daam is None else self.daam(x, mask)


class FrontEnd(nn.Module):
    """Input convolution (k7), strided stages and the projection to the code dimension."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.unit_rms = config.unit_rms
        self.input_conv = FrameConv(1, config.channels[0], 7, padding=3)
        self.stages = nn.ModuleList(
            Stage(c_in, c_out, stride, blocks=config.residual_blocks, daam=config.daam)
            for c_in, c_out, stride in zip(config.channels, config.channels[1:], config.strides)
        )
        self.projection = Linear(config.channels[-1], config.code_dim)

    def forward(
        self, waveform: Tensor, lengths_samples: Tensor | None
    ) -> tuple[Tensor, FrameMask | None]:
        """Waveform (B, S) -> frames (B, T, D), padding zero, and their mask.

        Under autocast the frames, and with them the residual stream of the blocks above, stay in
        the parameters' float32.
        """
        if lengths_samples is not None:
            real = valid_frames(lengths_samples, waveform.shape[1])
            waveform = waveform.masked_fill(~real, 0)
        if self.unit_rms:
            waveform = to_unit_rms(waveform, lengths_samples)
        stage = self.stages[0]
        x, mask = stem(waveform, lengths_samples, self.input_conv, stage.conv), None
        if lengths_samples is not None:
            mask = frame_mask(stage_length(lengths_samples, stage.stride), x.shape[1])
        x = stage.refine(x, mask)
        for stage in self.stages[1:]:
            x, mask = stage(x, mask)
        frames = self.projection(x).to(self.projection.weight.dtype)
        return zero_padding(frames, mask), mask


def to_unit_rms(waveform: Tensor, lengths_samples: Tensor | None) -> Tensor:
    """Divide each row of (B, S), padding zero, by its RMS; silence below -100 dB stays quiet."""
    power = at_least_float32(waveform).square().sum(dim=1)
    if lengths_samples is None:
        power = power / max(waveform.shape[1], 1)
    else:
        power = power / lengths_samples.clamp(min=1)
    return (waveform * (power + 1e-10).rsqrt()[:, None]).to(waveform.dtype)
