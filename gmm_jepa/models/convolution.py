"""Convolutions over frame-major tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.ops.fused import exporting, takes_phases, takes_products, takes_wide


class FrameConv(nn.Module):
    """One-dimensional convolution of frame-major (B, T, C), parameters as in `nn.Conv1d`.

    It runs as a two-dimensional convolution of height one: frame-major memory then *is* the
    channels-last layout, which oneDNN and cuDNN take as it lies. Against `F.conv1d` that halved
    the time of the residual blocks' convolutions (16 channels, 8 x 4,000 frames, forward and
    backward, one core: 2.5 against 4.2 to 6.2 ms).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(in_channels // groups * kernel)  # nn.Conv1d's own default
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_channels) -> (B, T', out_channels); padding frames of x must be zero."""
        kernel = self.weight.shape[2]
        same = self.stride == 1 and 2 * self.padding == self.dilation * (kernel - 1)
        if same and kernel % 2 == 1 and takes_phases(x, self.dilation):
            return self.by_phases(x)
        if takes_wide(x, self.weight):
            with torch.autocast(x.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self.by_torch(x.float(), self.weight.float(), bias).to(torch.bfloat16)
        return self.by_torch(x, self.weight, self.bias)

    def by_torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` as torch's convolution of an image."""
        y = F.conv2d(
            x.transpose(1, 2).unsqueeze(2),
            weight.unsqueeze(2),
            bias,
            stride=(1, self.stride),
            padding=(0, self.padding),
            dilation=(1, self.dilation),
            groups=self.groups,
        )
        return y.squeeze(2).transpose(1, 2)

    def by_phases(self, x: Tensor) -> Tensor:
        """`forward` without a dilation, of an odd kernel that keeps the number of frames.

        Frames a dilation apart are neighbours in an image of T / dilation rows, which is the same
        memory, so a filter of one column does it.
        """
        (B, T, C), d = x.shape, self.dilation
        n_rows = -(-T // d)
        rows = F.pad(x, (0, 0, 0, n_rows * d - T)).reshape(B, n_rows, d, C)
        padding = (self.weight.shape[2] // 2, 0)
        image, weight = rows.permute(0, 3, 1, 2), self.weight.unsqueeze(3)
        y = F.conv2d(image, weight, self.bias, padding=padding, groups=self.groups)
        return y.permute(0, 2, 3, 1).reshape(B, n_rows * d, -1)[:, :T]


class StridedConv(FrameConv):
    """2 s taps with stride s: every frame is seen by two of the next stage's."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 2 * stride, stride=stride, padding=stride // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_channels) -> (B, T', out_channels); padding frames of x must be zero."""
        if takes_products(x, self.weight, self.stride):
            return ops.strided_conv(x, self.weight, self.bias, self.stride)
        return super().forward(x)


class DepthwiseConv(FrameConv):
    """One filter of odd length a channel, as many frames out as in, by `ops.depthwise_conv`."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> the same shape; an exported graph holds torch's own convolution."""
        return super().forward(x) if exporting() else ops.depthwise_conv(x, self.weight, self.bias)
