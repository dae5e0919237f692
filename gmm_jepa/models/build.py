"""From the config of an encoder to the encoder."""

from __future__ import annotations

from typing import TypeAlias

from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerEncoder
from gmm_jepa.models.encoder import Encoder
from gmm_jepa.models.transformer import TransformerConfig, TransformerEncoder

EncoderConfig: TypeAlias = ConformerConfig | TransformerConfig


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder of a config, initialised from PyTorch's global generator."""
    if isinstance(config, TransformerConfig):
        return TransformerEncoder(config)
    return ConformerEncoder(config)
