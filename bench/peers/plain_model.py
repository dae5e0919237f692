"""The published conformer JEPA in plain eager PyTorch, as a competent user would write it.

A peer to measure against, not part of the package: channels-first convolutions from `torch.nn`,
attention with its bias materialised as (batch, heads, T, T), no handling of padding. Parameters
have the names of the published checkpoints (arXiv 2602.09040), so that
`gmm_jepa.models.export_published` loads into it and both compute the same numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa.models import ConformerConfig

CHUNKS, GAUSSIANS = 4, 4


class Snake(nn.Module):
    """x + sin(a x)^2 / a."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> the same shape."""
        a = F.softplus(self.a) + 0.01
        return x + torch.sin(a * x) ** 2 / a


class ResidualBlock(nn.Module):
    """Three dilated convolutions, each with a plain one behind it."""

    def __init__(self, channels: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> the same shape."""
        for first, second in zip(self.convs1, self.convs2):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class DaamHead(nn.Module):
    """Density-adaptive attention within one chunk of time."""

    def __init__(self) -> None:
        super().__init__()
        self.mean_offsets = nn.Parameter(torch.zeros(GAUSSIANS))
        self.c = nn.Parameter(torch.randn(GAUSSIANS).exp())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> the same shape."""
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        std = torch.sqrt(variance + 1e-8)
        log_density = torch.zeros_like(x)
        for offset, c in zip(self.mean_offsets, self.c):
            y = ((x - (mean + offset)) / std).clamp(-10, 10)
            c2 = c.clamp(0.01, 10) ** 2 + 1e-8
            log_density = log_density - y**2 / (2 * c2) - 0.5 * math.log(2 * math.pi)
            log_density = log_density - 0.5 * torch.log(c2)
        weights = torch.exp(log_density - torch.logsumexp(log_density, dim=-1, keepdim=True))
        return x + x * weights


class DaamLayer(nn.Module):
    """Four chunks of time, each with its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(DaamHead() for _ in range(CHUNKS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> the same shape, in float32."""
        size = x.shape[-1] // CHUNKS
        parts = x.float().split([size] * (CHUNKS - 1) + [x.shape[-1] - size * (CHUNKS - 1)], dim=-1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts)], dim=-1)


class Daam(nn.Module):
    """A stack of one layer, as the checkpoints name it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DaamLayer()])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> the same shape."""
        return self.layers[0](x)


class Stage(nn.Module):
    """Strided convolution, snake, residual blocks, DAAM if on."""

    def __init__(self, c_in: int, c_out: int, stride: int, blocks: int, daam: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, 2 * stride, stride=stride, padding=stride // 2)
        self.snake = Snake(c_out)
        self.res = nn.ModuleList(ResidualBlock(c_out, (1, 3**i, 5**i)) for i in range(blocks))
        self.gaatn = Daam() if daam else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T')."""
        x = self.snake(self.conv(x))
        for block in self.res:
            x = block(x)
        return x if self.gaatn is None else self.gaatn(x)


class RelativeBias(nn.Module):
    """Gated relative position bias, one for all blocks."""

    def __init__(self, heads: int, head_dim: int, n_buckets: int, max_distance: int) -> None:
        super().__init__()
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.rel_pos_embed = nn.Embedding(n_buckets, heads)
        self.gate_u_vec = nn.Parameter(0.02 * torch.randn(heads, head_dim))
        self.gate_w_vec = nn.Parameter(0.02 * torch.randn(heads, head_dim))
        self.gate_scale_scalar = nn.Parameter(torch.ones(heads))

    def forward(self, q: Tensor) -> Tensor:
        """(B, H, T, d) queries -> (B, H, T, T) bias."""
        half, near = self.n_buckets // 2, self.n_buckets // 4
        place = torch.arange(q.shape[2], device=q.device)
        relative = place[None, :] - place[:, None]
        distance = relative.abs()
        far = torch.log(distance.clamp(min=near) / near) / math.log(self.max_distance / near) * near
        bucket = torch.where(distance < near, distance, (near + far.long()).clamp(max=half - 1))
        d = self.rel_pos_embed(bucket + half * (relative >= 0)).permute(2, 0, 1)  # (H, T, T)
        u = torch.sigmoid(torch.einsum("bhtd,hd->bht", q, self.gate_u_vec))
        r = torch.sigmoid(torch.einsum("bhtd,hd->bht", q, self.gate_w_vec))
        gate = 1 + u + (1 - u) * r * self.gate_scale_scalar[:, None]
        return d * gate[..., None]


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward; all residual."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, p = config.code_dim, config.dropout
        self.heads, self.p = config.heads, p
        self.ff1, self.ff2 = self._feed_forward(dim, p), self._feed_forward(dim, p)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        kernel = config.conv_kernel
        self.conv = nn.Sequential(
            nn.GroupNorm(1, dim),
            nn.Conv1d(dim, 2 * dim, 1),
            nn.GLU(dim=1),
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim),
            nn.GroupNorm(1, dim),
            nn.SiLU(),
            nn.Conv1d(dim, dim, 1),
            nn.Dropout(p),
        )

    @staticmethod
    def _feed_forward(dim: int, p: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(p),
            nn.Linear(4 * dim, dim),
            nn.Dropout(p),
        )

    def forward(self, x: Tensor, bias: RelativeBias | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + 0.5 * self.ff1(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias(q)
        weights = F.dropout(scores.softmax(dim=-1), self.p, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + 0.5 * self.ff2(x)


class LayerAttention(nn.Module):
    """One weight a layer, from time-pooled layers."""

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(dim, dim))

    def forward(self, layers: list[Tensor]) -> Tensor:
        """L layers (B, T, D) -> (B, T, D)."""
        stacked = torch.stack(layers, dim=1)  # (B, L, T, D)
        pooled = stacked.mean(dim=2)
        q = self.q_proj(pooled[:, -1]).unflatten(-1, (self.heads, -1))
        k = self.k_proj(pooled).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("bhd,blhd->bhl", q, k) / math.sqrt(q.shape[-1])
        weights = scores.softmax(dim=-1).mean(dim=1)  # (B, L)
        return (stacked * weights[..., None, None]).sum(dim=1)


class ClusterHead(nn.Module):
    """MLP to K logits."""

    def __init__(self, dim: int, n_clusters: int, p: float) -> None:
        super().__init__()
        hidden = 2 * dim
        self.in_proj, self.in_norm = nn.Linear(dim, hidden), nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Dropout(p),
                nn.Linear(hidden, hidden),
                nn.Dropout(p),
            )
            for _ in range(3)
        )
        self.out_norm, self.out_proj = nn.LayerNorm(hidden), nn.Linear(hidden, n_clusters)

    def forward(self, z: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        x = F.gelu(self.in_norm(self.in_proj(z)))
        for block in self.blocks:
            x = x + block(x)
        return self.out_proj(self.out_norm(x))


class PlainEncoder(nn.Module):
    """Waveform to frames."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_conv = nn.Conv1d(1, config.channels[0], 7, padding=3)
        self.encoder = nn.ModuleList(
            Stage(c_in, c_out, stride, config.residual_blocks, config.daam)
            for c_in, c_out, stride in zip(config.channels, config.channels[1:], config.strides)
        )
        self.proj = nn.Conv1d(config.channels[-1], config.code_dim, 1)
        self.rel_pos_bias = (
            RelativeBias(
                config.heads,
                config.code_dim // config.heads,
                config.n_buckets,
                config.max_distance,
            )
            if config.relative_bias
            else None
        )
        self.conformers = nn.ModuleList(ConformerBlock(config) for _ in range(config.layers))
        self.layer_attention = LayerAttention(config.code_dim)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, S) -> (B, T, D)."""
        if self.config.unit_rms:
            power = waveform.square().mean(dim=1, keepdim=True)
            waveform = waveform * (power + 1e-10).rsqrt()
        x = self.input_conv(waveform[:, None])
        for stage in self.encoder:
            x = stage(x)
        x = self.proj(x).transpose(1, 2)
        layers = [x]
        for block in self.conformers:
            x = block(x, self.rel_pos_bias)
            layers.append(x)
        return self.layer_attention(layers)


class PlainStudent(PlainEncoder):
    """The encoder with its heads."""

    def __init__(self, config: ConformerConfig, n_clusters: int) -> None:
        super().__init__(config)
        dim = config.code_dim
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, dim, 1))
        self.cluster_head = ClusterHead(dim, n_clusters, config.dropout)
        self.predictor = nn.ModuleList(
            [nn.Conv1d(dim, dim, 1), nn.GELU(), ConformerBlock(config), nn.Conv1d(dim, dim, 1)]
        )

    def predict(self, z: Tensor, keep: Tensor) -> Tensor:
        """z (B, T, D), keep (B, T) -> the teacher's frames as predicted, (B, T, D)."""
        kept = keep[..., None].to(z.dtype)
        masked = z * kept + self.mask_token[..., 0] * (1 - kept)
        first, gelu, block, last = self.predictor
        x = gelu(first(masked.transpose(1, 2))).transpose(1, 2)
        return last(block(x, self.rel_pos_bias).transpose(1, 2)).transpose(1, 2)
