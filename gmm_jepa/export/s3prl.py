"""The interface of s3prl's upstreams (s3prl ``upstream/interfaces.py``, SUPERB)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gmm_jepa.encoder import load_encoder


class UpstreamExpert(nn.Module):
    """Waveforms to all hidden states.

    Args:
        ckpt: a run folder, a model file, or a published ``.pt`` beside its ``config.json``.
    """

    def __init__(self, ckpt: str | Path, **_unused: object) -> None:
        super().__init__()
        self.encoder = load_encoder(ckpt)

    def get_downsample_rates(self, key: str) -> int:
        """Samples a frame, for every key."""
        return self.encoder.hop_samples

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor] | Tensor]:
        """Encode 16 kHz waveforms (S_i,).

        Returns:
            ``hidden_states``, a list of (B, T, D), padding zero, and ``last_hidden_state``.
        """
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        encoded = self.encoder(padded, lengths)
        return {
            "hidden_states": list(encoded.hidden_states),
            "last_hidden_state": encoded.last_hidden_state,
        }
