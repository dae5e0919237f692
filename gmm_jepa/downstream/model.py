"""What is trained: one weight a layer, and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmm_jepa.downstream.augment import SpecAugment


class BidirectionalLstm(nn.Module):
    """One LSTM layer each way over the real frames of each row; padding never enters.

    The same as PyTorch's bidirectional LSTM on a packed batch, from two plain ones: on a CPU these
    take the fused path, a seventh of the time (16 rows of 100 frames, 128 wide, 42 ms to 315 ms
    of one core, forward and backward).
    """

    def __init__(self, width: int, rnn_width: int) -> None:
        super().__init__()
        self.ahead = nn.LSTM(width, rnn_width, batch_first=True)
        self.back = nn.LSTM(width, rnn_width, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and lengths (B,) on the device of x -> (B, T, 2 W); undefined in padding."""
        frames = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        real = frames < lengths[:, None]
        mirror = torch.where(real, lengths[:, None] - 1 - frames, frames)[..., None]
        back, _ = self.back(x.gather(1, mirror.expand_as(x)))
        back = back.gather(1, mirror.expand_as(back))
        return torch.cat([self.ahead(x)[0], back], dim=-1)


class CtcHead(nn.Module):
    """Linear layer, bidirectional LSTMs with dropout after each, linear layer.

    Args:
        width: D of the features.
        n_tokens: V.
        projection: width of the first layer.
        rnn_layers, rnn_width: LSTMs, and the width of each direction.
        dropout: after each LSTM.
    """

    def __init__(
        self,
        width: int,
        n_tokens: int,
        *,
        projection: int,
        rnn_layers: int,
        rnn_width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(width, projection)
        widths = [projection, *[2 * rnn_width] * (rnn_layers - 1)]
        self.rnns = nn.ModuleList(BidirectionalLstm(w, rnn_width) for w in widths)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * rnn_width, n_tokens)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Features (B, T, D) and lengths (B,) -> logits (B, T, V), undefined in padding."""
        x, lengths = self.project(x), lengths.to(x.device)
        for rnn in self.rnns:
            x = self.dropout(rnn(x, lengths))
        return self.classify(x)


class PooledHead(nn.Module):
    """Linear layer, mean over real frames, linear layer; nothing nonlinear."""

    def __init__(self, width: int, n_classes: int, *, projection: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, projection)
        self.classify = nn.Linear(projection, n_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Features (B, T, D) and lengths (B,) -> logits (B, C)."""
        lengths = lengths.to(x.device)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        pooled = (self.project(x) * real[..., None]).sum(1) / lengths[:, None]
        return self.classify(pooled)


class Probe(nn.Module):
    """Weighted sum of frozen layers (softmax, even at the start), and a head on it.

    Args:
        n_layers: L.
        head: takes (B, T, D) and lengths.
        augment: of the weighted features, in training mode; None: none.
    """

    def __init__(self, n_layers: int, head: nn.Module, augment: SpecAugment | None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(n_layers))
        self.head, self.augment = head, augment

    @property
    def layer_weights(self) -> list[float]:
        """(L,), sum to one."""
        return self.weights.detach().softmax(0).tolist()

    def forward(self, layers: Tensor, lengths: Tensor) -> Tensor:
        """Layers (B, T, L, D) and lengths (B,) on the CPU -> the head's logits."""
        x = torch.einsum("btld,l->btd", layers, self.weights.softmax(0))
        if self.augment is not None and self.training:
            x = self.augment(x, lengths)
        return self.head(x, lengths)
