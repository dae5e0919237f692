"""Linear probe: what can one softmax layer read off frozen features?

Every row of a table is trained alike: features standardised on the training rows; weights from
zero; 1,000 steps of Adam on 512 random rows (on all, where there are fewer), learning rate 0.03
falling linearly to 0; L2 penalty 1e-3 / 2 |W|^2. On 30,000 frames of synthesised speech with 48
phones, three times as many steps at a third of the rate change the accuracy by 0.2 points
(log-mel), 0.4 (with context) and 0.1 (a trained encoder); a penalty of 1e-4 by -0.2, -1.7 and 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.evaluate.labels import ProbeData


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Softmax regression with a fixed budget; the same input gives the same answer."""

    steps: int = 1000
    """Steps of Adam."""
    batch: int = 512
    """Rows in a step."""
    learning_rate: float = 3e-2
    """At the first step."""
    penalty: float = 1e-3
    """Of the squared weights, halved."""
    seed: int = 0
    """Of the choice of rows."""

    def fit(self, features: Tensor, classes: Tensor, n_classes: int) -> FittedProbe:
        """Train on (N, D) float32 features with (N,) int64 classes, on their device."""
        mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
        n, d = features.shape
        weight = features.new_zeros(n_classes, d, requires_grad=True)
        bias = features.new_zeros(n_classes, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=self.learning_rate)
        draw = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            x, y = features, classes
            if n > self.batch:
                rows = torch.randint(n, (self.batch,), generator=draw).to(features.device)
                x, y = features[rows], classes[rows]
            loss = F.cross_entropy(F.linear((x - mean) / std, weight, bias), y)
            loss = loss + 0.5 * self.penalty * weight.square().sum()
            optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return FittedProbe(mean, std, weight.detach(), bias.detach())


@dataclass(frozen=True)
class FittedProbe:
    """A trained probe."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) int64 classes."""
        parts = [
            F.linear((part - self.mean) / self.std, self.weight, self.bias).argmax(dim=1)
            for part in features.split(16_384)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def score(
    answers: NDArray[np.int64], truth: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, float]:
    """Accuracy with its uncertainty, and macro F1.

    Args:
        answers: (N,) classes.
        truth: (N,) classes; -1 is one the probe could not know.
        groups: (N,) utterance of each row.

    Returns:
        ``accuracy``; ``standard_error``, binomial, as if rows were independent;
        ``standard_error_utterances``, from the spread of utterances, whose frames are not (the
        honest one; speakers differ yet more); ``macro_f1`` over the classes that occur in `truth`.
    """
    right = answers == truth
    n, accuracy = len(truth), float(right.mean())
    _, owner = np.unique(groups, return_inverse=True)
    excess = np.bincount(owner, weights=right - accuracy)
    f1 = []
    for c in np.unique(truth):
        hits = int((right & (truth == c)).sum())
        f1.append(2 * hits / int((truth == c).sum() + (answers == c).sum()))
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "standard_error_utterances": float(np.sqrt((excess**2).sum()) / n),
        "macro_f1": float(np.mean(f1)),
    }


def run_probe(
    features: Tensor, data: ProbeData, probe: LinearProbe, device: torch.device
) -> dict[str, Any] | None:
    """Train and test on rows of (N, D) features; None where there is nothing to tell apart.

    Returns:
        `score`'s numbers with ``dimensions``, ``n_train``, ``n_test``.
    """
    if len(data.classes) < 2 or not len(data.test_rows):
        return None
    train, test = (
        features[torch.from_numpy(rows)].to(device) for rows in (data.train_rows, data.test_rows)
    )
    fitted = probe.fit(train, torch.from_numpy(data.train_classes).to(device), len(data.classes))
    answers = fitted.predict(test).cpu().numpy()
    return {
        "dimensions": features.shape[1],
        "n_train": len(data.train_rows),
        "n_test": len(data.test_rows),
        **score(answers, data.test_classes, data.test_groups),
    }


def majority(data: ProbeData) -> float:
    """Accuracy of always answering the commonest class of the training rows."""
    commonest = np.bincount(data.train_classes).argmax()
    return float((data.test_classes == commonest).mean())
