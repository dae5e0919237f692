"""Hugging Face config of a GMM-JEPA encoder."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class GmmJepaConfig(PretrainedConfig):
    """Sizes and switches of the encoder.

    Args:
        encoder: the encoder's own config with its ``kind``, as `gmm_jepa.config.to_dict` gives it.
    """

    model_type = "gmm_jepa"

    def __init__(self, encoder: dict[str, Any] | None = None, **options: Any) -> None:
        self.encoder = encoder or {"kind": "conformer"}
        self.hidden_size = self.encoder.get("code_dim", 512)
        self.num_hidden_layers = self.encoder.get("layers", 4)
        super().__init__(**options)
