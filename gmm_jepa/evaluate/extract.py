"""Frame features and cluster posteriors of single utterances, however long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gmm_jepa.errors import InputError
from gmm_jepa.models.jepa import JepaModel

WINDOW_FRAMES = 1500
"""Longer utterances are encoded in windows of 30 s, so that memory stays bounded."""
CONTEXT_FRAMES = 100
"""Windows see two seconds more on each side than is kept of them."""


@torch.inference_mode()
def extract(
    model: JepaModel, waveform: np.ndarray, *, layers: Sequence[int] = (), clusters: bool = False
) -> dict[str, np.ndarray]:
    """Features of one utterance from the online encoder, in eval mode.

    Args:
        model: a trained model.
        waveform: (S,) float32, mono, 16 kHz.
        layers: hidden layers to return; 0 is the projected front end, i the output of block i.
        clusters: also return the cluster head's posteriors.

    Returns:
        ``output`` (T, D) float32, the weighted sum of the layers; ``layer_<i>`` (T, D) for each i
        of `layers`; ``clusters`` (T, K) float32 if asked for.

    Raises:
        InputError: there is no such layer.
    """
    n_layers = model.config.layers
    for layer in layers:
        if not 0 <= layer <= n_layers:
            raise InputError(f"layers: expected 0 to {n_layers}, got {layer}")
    model.eval()
    device = next(model.parameters()).device
    samples = torch.from_numpy(waveform).to(device)
    total = model.online.n_frames(len(samples))
    parts = [
        _window(model, samples, first, min(first + WINDOW_FRAMES, total), total, layers, clusters)
        for first in range(0, max(total, 1), WINDOW_FRAMES)
    ]
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _window(
    model: JepaModel,
    samples: Tensor,
    first: int,
    last: int,
    total: int,
    layers: Sequence[int],
    clusters: bool,
) -> dict[str, Tensor]:
    """The frames [first, last) of `total`, encoded with context on both sides."""
    hop = model.online.hop_samples
    begin = max(0, first - CONTEXT_FRAMES)
    end = last + CONTEXT_FRAMES
    stop = len(samples) if end >= total else (end + 1) * hop
    encoded = model.encode(samples[None, begin * hop : stop])
    kept = slice(first - begin, last - begin)
    result = {"output": encoded.output[0, kept].float()}
    for layer in layers:
        result[f"layer_{layer}"] = encoded.layers[layer][0, kept].float()
    if clusters:
        result["clusters"] = model.cluster_head(result["output"]).softmax(dim=-1)
    return result
