"""The JEPA pair: an online encoder that learns, a teacher that follows it, and the heads."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.config import ConformerConfig
from gmm_jepa.models.conformer import ConformerEncoder, EncoderOutput
from gmm_jepa.models.heads import ClusterHead, Predictor
from gmm_jepa.models.padding import frame_mask


class JepaModel(nn.Module):
    """Online encoder, EMA teacher, predictor, cluster head and mask token.

    Initialised by PyTorch's defaults from its global generator: one seed, one model. The teacher
    starts as a copy of the online encoder, takes no gradient and never leaves eval mode.
    """

    def __init__(self, config: ConformerConfig, n_clusters: int) -> None:
        super().__init__()
        if n_clusters < 1:
            raise InputError(f"n_clusters: expected at least 1, got {n_clusters}")
        self.config, self.n_clusters = config, n_clusters
        self.online = ConformerEncoder(config)
        self.predictor = Predictor(config)
        self.cluster_head = ClusterHead(config.code_dim, n_clusters, config.dropout)
        self.mask_token = nn.Parameter(0.02 * torch.randn(config.code_dim))
        self.teacher = copy.deepcopy(self.online).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> JepaModel:
        """As `nn.Module.train`, but the teacher stays in eval mode: no dropout in targets."""
        super().train(mode)
        self.teacher.eval()
        return self

    def encode(self, waveform: Tensor, lengths_samples: Tensor | None = None) -> EncoderOutput:
        """The online encoder; arguments as in `ConformerEncoder.forward`."""
        return self.online(waveform, lengths_samples)

    @torch.no_grad()
    def teach(self, waveform: Tensor, lengths_samples: Tensor | None = None) -> Tensor:
        """The teacher's frames (B, T, D), without gradient."""
        return self.teacher(waveform, lengths_samples).output

    def predict(self, z: Tensor, keep: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        """Predict the teacher's frames from z with masked frames replaced by the mask token.

        Args:
            z: (B, T, D), from `encode`.
            keep: (B, T) bool, or float 0 and 1; where it is 0 the frame is masked.
            lengths_frames: (B,) real frames of each row; None: all.

        Returns:
            (B, T, D), padding zero.
        """
        if keep.shape != z.shape[:2]:
            raise InputError(f"keep: expected shape {tuple(z.shape[:2])}, got {tuple(keep.shape)}")
        if z.shape[1] == 0:
            return z
        masked = torch.where(keep[..., None] > 0, z, self.mask_token.to(z.dtype))
        mask = None if lengths_frames is None else frame_mask(lengths_frames, z.shape[1])
        return self.predictor(masked, mask, self.online.relative_bias)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * online, in place."""
        ops.ema_update(list(self.teacher.parameters()), list(self.online.parameters()), decay)
