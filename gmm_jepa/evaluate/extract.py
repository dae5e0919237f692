"""Frame features and cluster posteriors of single utterances, however long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.evaluate.embed import head_frames
from gmm_jepa.models.jepa import JepaModel

WINDOW_FRAMES = 1500
"""Longer utterances are encoded in windows of 30 s, so that memory stays bounded."""
CONTEXT_FRAMES = 100
"""Windows see two seconds more on each side than is kept of them."""


class Extractor:
    """Features of utterances from the online encoder, in eval mode.

    What an encoder takes from the whole signal (its level, norms and means over time) it takes
    from each window, so frames of utterances over 30 s differ from those of one pass.

    Args:
        model: a trained model; stays in eval mode.
        layers: hidden layers to return; 0 is the projected front end, i the output of block i.
        clusters: also return the cluster head's posteriors.
        head_input: "encoder" or "predictor": what the cluster head reads.

    Raises:
        InputError: there is no such layer, or no cluster head.
    """

    def __init__(
        self,
        model: JepaModel,
        *,
        layers: Sequence[int] = (),
        clusters: bool = False,
        head_input: str = "encoder",
    ) -> None:
        n_layers = model.config.layers
        for layer in layers:
            if not 0 <= layer <= n_layers:
                raise InputError(f"layers: expected 0 to {n_layers}, got {layer}")
        if clusters and model.cluster_head is None:
            raise InputError("clusters: this run has no cluster head")
        self.model, self.layers = model.eval(), layers
        self.clusters, self.head_input = clusters, head_input

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """Encode one utterance.

        Args:
            waveform: (S,) float32, mono, 16 kHz.

        Returns:
            ``output`` (T, D) float32, the weighted sum of the layers; ``layer_<i>`` (T, D) for each
            i of `layers`; ``clusters`` (T, K) float32 if asked for.
        """
        samples = torch.from_numpy(waveform).to(next(self.model.parameters()).device)
        total = self.model.online.n_frames(len(samples))
        parts = [
            self._window(samples, first, min(first + WINDOW_FRAMES, total), total)
            for first in range(0, max(total, 1), WINDOW_FRAMES)
        ]
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}

    def _window(self, samples: Tensor, first: int, last: int, total: int) -> dict[str, Tensor]:
        """The frames [first, last) of `total`, encoded with context on both sides."""
        model = self.model
        hop = model.online.hop_samples
        begin = max(0, first - CONTEXT_FRAMES)
        end = last + CONTEXT_FRAMES
        stop = len(samples) if end >= total else (end + 1) * hop
        encoded = model.encode(samples[None, begin * hop : stop])
        kept = slice(first - begin, last - begin)
        result = {"output": encoded.output[0, kept].float()}
        for layer in self.layers:
            result[f"layer_{layer}"] = encoded.layers[layer][0, kept].float()
        if self.clusters:
            heard = head_frames(model, encoded.output, self.head_input)[0, kept]
            result["clusters"] = model.cluster_head(heard.float()).softmax(dim=-1)
        return result
