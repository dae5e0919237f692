"""Self-attention with the gated relative position bias (as in WavLM, arXiv 2110.13900)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmm_jepa import ops
from gmm_jepa.models.padding import valid_frames
from gmm_jepa.ops.fused import exporting


class RelativeBias(nn.Module):
    """A bias of relative position for each head, to be gated; one module serves all blocks."""

    def __init__(self, heads: int, *, n_buckets: int, max_distance: int) -> None:
        super().__init__()
        self.n_buckets, self.max_distance = n_buckets, max_distance
        self.embedding = nn.Embedding(n_buckets, heads)

    def table(self, n_frames: int) -> Tensor:
        """(H, 2 T - 1): the bias of relative position rel = key - query at column rel + T - 1."""
        relative = torch.arange(1 - n_frames, n_frames, device=self.embedding.weight.device)
        sizes = {"n_buckets": self.n_buckets, "max_distance": self.max_distance}
        return self.embedding(relative_bucket(relative, **sizes)).T


class GatedRelativeBias(RelativeBias):
    """bias[b, h, i, j] = table[h, j - i] * gate[b, h, i].

    With u = sigmoid(q . gate_u[h]) and r = sigmoid(q . gate_r[h]) from the unscaled query q,
    gate = 1 + u + (1 - u) r s_h.
    """

    def __init__(self, heads: int, head_dim: int, *, n_buckets: int, max_distance: int) -> None:
        super().__init__(heads, n_buckets=n_buckets, max_distance=max_distance)
        self.gate_u = nn.Parameter(0.02 * torch.randn(heads, head_dim))
        self.gate_r = nn.Parameter(0.02 * torch.randn(heads, head_dim))
        self.scale = nn.Parameter(torch.ones(heads))

    def gate(self, q: Tensor) -> Tensor:
        """(B, H, T, d) unscaled queries -> (B, H, T) gates.

        A product of two columns is a poor one on a GPU, and wants a copy of the queries; a compiler
        makes one pass of sums. Uncompiled they would be several.
        """
        if torch.compiler.is_compiling() and not exporting():
            vectors = (v.to(q.dtype)[:, None] for v in (self.gate_u, self.gate_r))
            u, r = (torch.sigmoid((q * v).sum(dim=-1)) for v in vectors)
        else:
            vectors = torch.stack([self.gate_u, self.gate_r], dim=-1)  # (H, d, 2)
            u, r = torch.sigmoid(q @ vectors.to(q.dtype)).unbind(dim=-1)
        return 1 + u + (1 - u) * r * self.scale.to(q.dtype)[:, None]


def relative_bucket(relative: Tensor, *, n_buckets: int, max_distance: int) -> Tensor:
    """Bucket of a relative position: exact when near, logarithmic when far, one set a side.

    With half = n_buckets / 2 and near = n_buckets / 4: |rel| below near is its own bucket;
    beyond, near + floor(log(|rel| / near) / log(max_distance / near) * near), at most half - 1.
    Positions rel >= 0 are shifted by half.
    """
    half, near = n_buckets // 2, n_buckets // 4
    distance = relative.abs()
    far = torch.log(distance.clamp(min=near) / near) / math.log(max_distance / near) * near
    far = (near + far.long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (relative >= 0)


def gated_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k' / sqrt(d) + table[h, j - i] gate[b, h, i]) v, as `gmm_jepa.ops` has it.

    `attention_with_bias` takes over in an exported graph, which holds no ops of this package.

    Args:
        q, k, v: (B, H, T, d).
        table: (H, 2 T - 1), one value a head and relative position j - i, at column j - i + T - 1.
        gate: (B, H, T), one value a query.
        key_lengths: (B,) keys that exist in each row, each at least 1; None: all.
        dropout_p: dropout on the probabilities.

    Returns:
        (B, H, T, d).
    """
    form = attention_with_bias if exporting() else ops.gated_bias_attention
    return form(q, k, v, table, gate, key_lengths=key_lengths, dropout_p=dropout_p)


def attention_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    gate: Tensor,
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`gated_bias_attention` with the bias (B, H, T, T) written out."""
    n_frames = q.shape[2]
    # Row r, column j of the windows is table[r + j]; upside down, row i is r = T - 1 - i. (As
    # strides, because `unfold` fixes T when the model is exported.)
    windows = table.contiguous().as_strided(
        (len(table), n_frames, n_frames), (2 * n_frames - 1, 1, 1)
    )
    by_position = windows.flip(1)  # (H, T, T)
    bias = by_position * gate[..., None]
    if key_lengths is not None:
        bias = bias.masked_fill(~key_mask(key_lengths, n_frames), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p)


def key_mask(key_lengths: Tensor, n_frames: int) -> Tensor:
    """(B, 1, 1, T) bool: the keys that exist. An all-hidden row would be NaN: lengths >= 1."""
    return valid_frames(key_lengths, n_frames)[:, None, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Plain scaled dot-product attention, arguments as in `gated_bias_attention`."""
    mask = None if key_lengths is None else key_mask(key_lengths, q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
