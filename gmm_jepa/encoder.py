"""A pretrained encoder, ready to use: waveform in, hidden states out."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gmm_jepa.errors import InputError
from gmm_jepa.features import refuse_channels_last
from gmm_jepa.model_file import load_model
from gmm_jepa.models import Encoder, JepaModel, load_published
from gmm_jepa.train.trained import at_path


class EncodedSpeech(NamedTuple):
    """What an encoder makes of a batch of B waveforms; frames past a row's length are zero."""

    last_hidden_state: Tensor
    """(B, T, D), the encoder's output."""
    hidden_states: tuple[Tensor, ...]
    """The projected front end and every block's output, each (B, T, D)."""
    lengths: Tensor
    """(B,) int64, real frames of each row."""


class SpeechEncoder(nn.Module):
    """An encoder without what pretrained it; one frame every `hop_samples` of 16 kHz audio."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.encoder.hop_samples

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.config.code_dim

    def forward(
        self, waveform: Tensor | np.ndarray, lengths: Tensor | np.ndarray | None = None
    ) -> EncodedSpeech:
        """Encode.

        Args:
            waveform: (B, S) or (S,), 16 kHz, float in [-1, 1] or int16, tensor or array; taken in
                the dtype of the weights.
            lengths: (B,) samples of each row, 0 to S; None: all are real. Padding never changes a
                result.

        Raises:
            InputError: shapes or lengths do not fit, or the waveform is of another type.
        """
        try:
            rows = torch.as_tensor(waveform)
        except ValueError:  # of lists
            raise InputError(
                "waveform: expected (B, S) or (S,); pad rows of several lengths, and give lengths"
            ) from None
        dtype = next(self.parameters()).dtype
        if rows.dtype == torch.int16:
            rows = rows.to(dtype) / 2**15
        if rows.is_floating_point():
            rows = rows.to(dtype)
        rows = rows[None] if rows.dim() == 1 else rows
        refuse_channels_last(rows)
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
        encoded = self.encoder(rows, lengths)
        return EncodedSpeech(encoded.output, encoded.layers, encoded.lengths_frames)


def load_encoder(path: str | PathLike[str], *, teacher: bool = False) -> SpeechEncoder:
    """The pretrained encoder of a run or a file, in eval mode on the CPU.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints, a model file, or a
            published ``.pt`` beside its ``config.json``.
        teacher: the moving average instead of the encoder that was trained.

    Raises:
        InputError: there is no encoder, or no teacher, at this path.
    """
    model = _model(Path(path))
    encoder = model.teacher if teacher else model.online
    if encoder is None:
        raise InputError(f"{path}: a model without a teacher")
    return SpeechEncoder(encoder).eval()


def _model(path: Path) -> JepaModel:
    if path.suffix == ".pt":
        return load_published(path, path.with_name("config.json"))
    if path.suffix == ".safetensors":
        return load_model(path).model
    return at_path(path).model()
