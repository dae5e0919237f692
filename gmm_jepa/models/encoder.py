"""What all encoders share: the frame count, masking at the input, and the shape of the output."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmm_jepa.errors import InputError
from gmm_jepa.models.attention import RelativeBias
from gmm_jepa.models.padding import Count, FrameMask, zero_padding

Config = TypeVar("Config")


class EncoderOutput(NamedTuple):
    """What an encoder makes of a batch of B waveforms; frames past a row's length are zero."""

    output: Tensor
    """(B, T, D), z: the weighted sum of the layers, or the last of them."""
    layers: tuple[Tensor, ...]
    """The projected front end, masked if it was, and every block's output, each (B, T, D)."""
    layer_weights: Tensor
    """(B, len(layers)), rows sum to one."""
    lengths_frames: Tensor
    """(B,) int64, real frames of each row."""


class Encoder(nn.Module, Generic[Config]):
    """Waveform to frames of width ``config.code_dim``, one every ``hop_samples``.

    A subclass has a `front_end` and blocks, which share a `relative_bias` if there is one, and says
    how the layers become one output.
    """

    front_end: nn.Module
    relative_bias: RelativeBias | None
    blocks: nn.ModuleList
    recomputes_blocks = False
    """For the gradient, keep only what enters a block and compute its inside again."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def blocks_of(self, x: Tensor, mask: FrameMask | None) -> list[Tensor]:
        """Frames (B, T, D) with zero padding -> the output of every block, the same."""
        bias = self.relative_bias
        table = None if bias is None else bias.table(x.shape[1])
        layers = []
        for block in self.blocks:
            x = self.run(block, x, mask, bias, table)
            layers.append(x)
        return layers

    @abstractmethod
    def combine(self, layers: tuple[Tensor, ...], mask: FrameMask | None) -> tuple[Tensor, Tensor]:
        """Layers, each (B, T, D) -> output (B, T, D) and the layers' weights (B, L)."""

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """One block's output; dropout is the same when its inside is computed again."""
        if self.recomputes_blocks and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

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

    def forward(
        self,
        waveform: Tensor,
        lengths_samples: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            waveform: (B, S) float, in [-1, 1]. Padding may hold anything, even NaN.
            lengths_samples: (B,) integer, real samples of each row, 0 to S; None says that all
                are real and takes the faster path without masks.
            keep: (B, T) bool, or float 0 and 1: where it is 0, the frame that enters the blocks
                is `mask_token`; None: nothing is masked.
            mask_token: (D,), needed with `keep`.

        Raises:
            InputError: shapes or lengths do not fit, or there is no `mask_token` for `keep`.
        """
        _check_batch(waveform, lengths_samples)
        if keep is not None and mask_token is None:
            raise InputError("mask_token: expected with keep, got None")
        if lengths_samples is not None:
            lengths_samples = lengths_samples.to(waveform.device, torch.int64)
        n_frames = self.n_frames(waveform.shape[1])
        empty = n_frames == 0
        if empty:  # shorter than one frame: run one frame of padding, return none
            lengths_samples = waveform.new_zeros(len(waveform), dtype=torch.int64)
            waveform = F.pad(waveform, (0, 2 * self.hop_samples - waveform.shape[1]))
        x, mask = self.front_end(waveform, lengths_samples)
        if keep is not None and not empty:
            x = zero_padding(hide(x, keep, mask_token), mask)
        layers = (x, *self.blocks_of(x, mask))
        output, weights = self.combine(layers, mask)
        lengths = torch.full((len(x),), n_frames, device=x.device) if mask is None else mask.lengths
        if empty:
            output, layers = output[:, :0], tuple(layer[:, :0] for layer in layers)
        return EncoderOutput(output, layers, weights, lengths)


def hide(frames: Tensor, keep: Tensor, mask_token: Tensor) -> Tensor:
    """Frames (B, T, D) with the mask token (D,) wherever keep (B, T) is 0.

    Raises:
        InputError: `keep` does not fit the frames.
    """
    if keep.shape != frames.shape[:2]:
        raise InputError(f"keep: expected shape {tuple(frames.shape[:2])}, got {tuple(keep.shape)}")
    return torch.where(keep[..., None] > 0, frames, mask_token.to(frames.dtype))


def last_layer(layers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The last of the layers (B, T, D), and weights (B, L) that say so."""
    batch = layers[-1].shape[0]  # `len` would fix it when the model is exported
    weights = layers[-1].new_zeros(batch, len(layers))
    weights[:, -1] = 1
    return layers[-1], weights


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
    if lengths_samples is not None:
        _check_lengths(lengths_samples, waveform.shape[1])


def _check_lengths(lengths: Tensor, n_samples: int) -> None:
    """Refuse what is no number of samples; values only where nobody would have to wait for them."""
    if lengths.is_floating_point() or lengths.is_complex():
        raise InputError(f"lengths: expected integers, got {lengths.dtype}")
    readable = type(lengths) is Tensor and lengths.device.type == "cpu"  # and no fake one
    if not readable or torch.compiler.is_compiling():
        return
    if ((lengths < 0) | (lengths > n_samples)).any():
        raise InputError(f"lengths: expected 0 to {n_samples} samples each, got {lengths.tolist()}")
