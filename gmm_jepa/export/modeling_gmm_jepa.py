"""Hugging Face model around a GMM-JEPA encoder; needs the package gmm_jepa."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from gmm_jepa.config import EncoderConfig, from_dict
from gmm_jepa.models import build_encoder

from .configuration_gmm_jepa import GmmJepaConfig


class GmmJepaModel(PreTrainedModel):
    """Waveforms to hidden states, 50 frames a second; padding never changes a result."""

    config_class = GmmJepaConfig
    main_input_name = "input_values"
    base_model_prefix = ""

    def __init__(self, config: GmmJepaConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(from_dict(EncoderConfig, config.encoder))
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Encode.

        Args:
            input_values: (B, S) float, 16 kHz mono in [-1, 1], padded on the right.
            attention_mask: (B, S), 1 on real samples; None: all are.
            output_hidden_states: also return the projected front end and every block's output.
            return_dict: False gives a tuple.
        """
        lengths = None if attention_mask is None else attention_mask.long().sum(dim=-1)
        encoded = self.encoder(input_values, lengths)
        wanted = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        hidden = encoded.layers if wanted else None
        if return_dict is False:
            return (encoded.output,) if hidden is None else (encoded.output, hidden)
        return BaseModelOutput(last_hidden_state=encoded.output, hidden_states=hidden)
