"""Encoders and the heads that pretrain them."""

from gmm_jepa.models.build import EncoderConfig, build_encoder
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerEncoder
from gmm_jepa.models.encoder import Encoder, EncoderOutput
from gmm_jepa.models.heads import ClusterHead, Predictor
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.models.published import export_published, load_published
from gmm_jepa.models.transformer import TransformerConfig, TransformerEncoder

__all__ = [
    "ClusterHead",
    "ConformerConfig",
    "ConformerEncoder",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "JepaModel",
    "Predictor",
    "TransformerConfig",
    "TransformerEncoder",
    "build_encoder",
    "export_published",
    "load_published",
]
