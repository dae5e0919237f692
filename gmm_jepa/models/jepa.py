"""An online encoder that learns, a teacher that follows it, and the heads."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.errors import InputError
from gmm_jepa.models.build import EncoderConfig, build_encoder
from gmm_jepa.models.encoder import EncoderOutput, hide
from gmm_jepa.models.heads import ClusterHead, build_predictor
from gmm_jepa.models.linear import Linear
from gmm_jepa.models.padding import frame_mask
from gmm_jepa.models.transformer import TransformerConfig


class JepaModel(nn.Module):
    """Online encoder, mask token and, where wanted, EMA teacher, predictor and cluster head.

    Initialised by PyTorch's defaults from its global generator: one seed, one model. The teacher
    starts as a copy of the online encoder, takes no gradient and never leaves eval mode.

    Args:
        config: of the encoder.
        n_clusters: K, 0 without a cluster head.
        cluster_head: the deep residual head (published), one linear layer, or none.
        predicts: whether there are a predictor and a teacher.
    """

    def __init__(
        self,
        config: EncoderConfig,
        n_clusters: int,
        *,
        cluster_head: Literal["mlp", "linear", "none"] = "mlp",
        predicts: bool = True,
    ) -> None:
        super().__init__()
        if n_clusters < 1 and cluster_head != "none":
            raise InputError(f"n_clusters: expected at least 1, got {n_clusters}")
        self.config, self.n_clusters = config, n_clusters
        self.head_kind, self.predicts = cluster_head, predicts
        self.online = build_encoder(config)
        self.predictor = build_predictor(config) if predicts else None
        self.cluster_head: nn.Module | None = None
        if cluster_head == "mlp":
            self.cluster_head = ClusterHead(config.code_dim, n_clusters, config.dropout)
        elif cluster_head == "linear":
            self.cluster_head = Linear(config.code_dim, n_clusters)
        self.mask_token = nn.Parameter(0.02 * torch.randn(config.code_dim))
        if predicts and isinstance(config, TransformerConfig):
            # Published checkpoints hold it and nothing uses it: kept, so that they come back whole.
            self.mask_emb = nn.Parameter(torch.zeros(config.code_dim), requires_grad=False)
        self.teacher = copy.deepcopy(self.online).requires_grad_(False).eval() if predicts else None

    def train(self, mode: bool = True) -> JepaModel:
        """As `nn.Module.train`, but the teacher stays in eval mode: no dropout in targets."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def encode(
        self, waveform: Tensor, lengths_samples: Tensor | None = None, *, keep: Tensor | None = None
    ) -> EncoderOutput:
        """The online encoder; arguments as in `Encoder.forward`, masking with the mask token."""
        return self.online(waveform, lengths_samples, keep=keep, mask_token=self.mask_token)

    @torch.no_grad()
    def teach(self, waveform: Tensor, lengths_samples: Tensor | None = None) -> EncoderOutput:
        """The teacher's layers and output, without gradient."""
        return self.teacher(waveform, lengths_samples)

    def predict(
        self, z: Tensor, keep: Tensor | None, lengths_frames: Tensor | None = None
    ) -> Tensor:
        """Predict the teacher's frames from z with masked frames replaced by the mask token.

        Args:
            z: (B, T, D), from `encode`.
            keep: (B, T) bool, or float 0 and 1; where it is 0 the frame is masked. None: none is
                (the encoder saw masked frames already).
            lengths_frames: (B,) real frames of each row; None: all.

        Returns:
            (B, T, D), padding zero.
        """
        masked = z if keep is None else hide(z, keep, self.mask_token)
        if z.shape[1] == 0:
            return z
        mask = None if lengths_frames is None else frame_mask(lengths_frames, z.shape[1])
        return self.predictor(masked, mask, self.online.relative_bias)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * online, in place."""
        ops.ema_update(_held(self.teacher), _held(self.online), decay)


def _held(network: nn.Module) -> list[Tensor]:
    """The parameters; of sharded ones (distributed tensors) the parts that lie in this process."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in network.parameters()]
