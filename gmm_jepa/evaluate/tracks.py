"""What the cluster head and its targets say of the same held-out frames."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.evaluate import clusters
from gmm_jepa.models.jepa import JepaModel
from gmm_jepa.objectives.targets import Clusters


class Tracks(NamedTuple):
    """Per held-out frame (N,): what the cluster head and its targets (mixture or k-means) say."""

    head: NDArray[np.int64]
    mixture: NDArray[np.int64]
    head_entropy: NDArray[np.float32]
    """Nats."""
    mixture_entropy: NDArray[np.float32]
    """Nats: the entropy of the training targets."""
    kl: NDArray[np.float32]
    """KL(target || head's posterior), nats; for hard targets the cross-entropy."""


@torch.inference_mode()
def follow(
    model: JepaModel,
    heard: Tensor,
    frames: Tensor,
    targets: Clusters,
    *,
    chunk_frames: int = 8192,
) -> Tracks:
    """Clusters and posteriors, frame by frame, without masks, in eval mode.

    Args:
        model: whose cluster head is asked, on any device.
        heard: (N, D) float32 on the CPU: what the head reads.
        frames: (N, D') float32 beside them: what the targets are made of.
        targets: on the model's device.
        chunk_frames: so many frames at a time, with (chunk, K) float32 in memory.
    """
    device = next(model.parameters()).device
    was_training = model.cluster_head.training
    model.cluster_head.eval()
    parts = []
    for heard_part, frames_part in zip(heard.split(chunk_frames), frames.split(chunk_frames)):
        logits = model.cluster_head(heard_part.to(device)).float()
        head = torch.log_softmax(logits, dim=-1)
        target = targets.log_posterior(frames_part.to(device))
        p = target.exp()
        log_ratio = torch.where(p > 0, target - head, 0.0)
        parts.append(
            (
                head.argmax(-1),
                target.argmax(-1),
                -(head.exp() * head).sum(-1),
                torch.special.entr(p).sum(-1),
                (p * log_ratio).sum(-1),
            )
        )
    model.cluster_head.train(was_training)
    return Tracks(*(torch.cat(column).cpu().numpy() for column in zip(*parts)))


def describe(tracks: Tracks, offsets: NDArray[np.int64], n_clusters: int) -> dict[str, Any]:
    """Usage and steadiness of both tracks, and how far they agree, as plain numbers."""
    numbers: dict[str, Any] = {"n_clusters": n_clusters, "n_frames": len(tracks.head)}
    for name, labels in (("head", tracks.head), ("mixture", tracks.mixture)):
        numbers[name] = {
            **clusters.usage(np.bincount(labels, minlength=n_clusters)),
            "adjacent_consistency": clusters.adjacent_consistency(labels, offsets),
        }
    return numbers | {
        "agreement": float((tracks.head == tracks.mixture).mean()),
        "kl": float(tracks.kl.mean()),
        "target_entropy": float(tracks.mixture_entropy.mean()),
        "head_entropy": float(tracks.head_entropy.mean()),
    }
