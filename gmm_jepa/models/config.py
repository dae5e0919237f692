"""What a conformer encoder looks like, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from gmm_jepa.errors import InputError
from gmm_jepa.models.padding import Count, stage_length

AGGREGATION_HEADS = 4
"""Heads of the layer aggregation, whatever the blocks have (published)."""


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Sizes and switches of the conformer encoder and its predictor; defaults as published.

    Raises:
        InputError: a size is out of range, or two sizes do not fit each other.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256)
    """Channels after the input convolution and after every strided stage."""
    strides: tuple[int, ...] = (8, 8, 5)
    """Downsampling of every stage; their product is the hop in samples."""
    residual_blocks: int = 4
    """Residual blocks a stage; block i has dilations (1, 3^i, 5^i)."""
    code_dim: int = 512
    """Width of the frames, D."""
    layers: int = 4
    """Conformer blocks."""
    heads: int = 32
    """Attention heads of every block."""
    conv_kernel: int = 31
    """Taps of the depthwise convolution in every block, in frames (odd)."""
    daam: bool = True
    """Density-adaptive attention at the end of every stage."""
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
    aggregation: Literal["attention", "last"] = "attention"
    """The output: the layers' weighted sum, or the last block's (published WavLM-style)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "strides", tuple(self.strides))
        if len(self.strides) < 1 or len(self.channels) != len(self.strides) + 1:
            raise InputError(
                "channels: expected one more entry than strides (at least 1 stride), "
                f"got channels {self.channels} and strides {self.strides}"
            )
        for name in ("residual_blocks", "code_dim", "layers", "heads", "conv_kernel"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "channels", min(self.channels) >= 1, "positive sizes")
        _require(self, "strides", min(self.strides) >= 2, "strides of at least 2")
        _require(self, "conv_kernel", self.conv_kernel % 2 == 1, "an odd number")
        multiple = f"a multiple of heads = {self.heads}"
        _require(self, "code_dim", self.code_dim % self.heads == 0, multiple)
        multiple = f"a multiple of {AGGREGATION_HEADS} (layer aggregation)"
        _require(self, "code_dim", self.code_dim % AGGREGATION_HEADS == 0, multiple)
        _require(self, "n_buckets", self.n_buckets >= 4 and self.n_buckets % 4 == 0, "4, 8, ...")
        near = self.n_buckets // 4
        _require(
            self, "max_distance", self.max_distance > near, f"more than n_buckets / 4 = {near}"
        )
        _require(self, "dropout", 0 <= self.dropout < 1, "a number in [0, 1)")
        _require(self, "aggregation", self.aggregation in ("attention", "last"), "attention, last")

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return prod(self.strides)

    @property
    def frame_centre_samples(self) -> float:
        """Sample on which frame 0 is centred, by stride and padding arithmetic."""
        centre, hop = 0.0, 1
        for stride in self.strides:
            centre += hop * ((2 * stride - 1) / 2 - stride // 2)
            hop *= stride
        return centre

    def n_frames(self, n_samples: Count) -> Count:
        """Frames made of so many samples (an int, or an integer tensor)."""
        for stride in self.strides:
            n_samples = stage_length(n_samples, stride)
        return n_samples


def _require(config: ConformerConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}, got {getattr(config, name)}")
