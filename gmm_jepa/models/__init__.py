"""Encoders and the heads that pretrain them."""

from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerEncoder, EncoderOutput
from gmm_jepa.models.heads import ClusterHead, Predictor
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.models.published import export_published, load_published

__all__ = [
    "ClusterHead",
    "ConformerConfig",
    "ConformerEncoder",
    "EncoderOutput",
    "JepaModel",
    "Predictor",
    "export_published",
    "load_published",
]
