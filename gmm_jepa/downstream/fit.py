"""One training: features, a task, a learning rate; the best state on the dev part is tested."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.downstream.data import Fold, Labelled
from gmm_jepa.downstream.features import Features
from gmm_jepa.downstream.model import Probe
from gmm_jepa.downstream.settings import ProbeSettings
from gmm_jepa.downstream.tasks import Task

_MAX_SKIPPED = 10
"""Updates with a non-finite gradient, in a row, after which a training is given up."""


@dataclass(frozen=True)
class Problem:
    """What a head learns, of which features, and where it is trained."""

    features: Features
    data: Labelled
    task: Task
    device: torch.device

    def batch(self, utterances: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Features (B, T, L, D) on the device, lengths (B,) int64 on the CPU, answers."""
        layers, lengths = self.features.batch(utterances)
        return layers.to(self.device), lengths, [self.data.answers[i] for i in utterances]


@dataclass(frozen=True)
class Fitted:
    """What a training came to."""

    curve: list[dict[str, Any]]
    """A line an evaluation: step, train_loss, dev_loss and the dev scores."""
    best: dict[str, Any] | None
    """The chosen line of it; None where the training diverged before the first."""
    test: dict[str, Any] | None
    """Loss and scores of that state on the test part."""
    hypotheses: list[str]
    """Its answers on the test part."""
    layer_weights: list[float]
    """(L,), sum to one."""
    n_weights: int
    """Trained ones."""
    diverged: bool
    seconds: float


def fit(
    problem: Problem,
    fold: Fold,
    settings: ProbeSettings,
    learning_rate: float,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train on the train part, choose on the dev part, answer the test part.

    The score that chooses is the task's first, ties go to the lower dev loss. The same arguments
    give the same result on one machine.

    Args:
        problem: of the whole corpus.
        fold: its parts.
        settings: how.
        learning_rate: Adam's.
        progress: called with steps done and in all.
    """
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    task, features = problem.task, problem.features
    probe = task.build(*features.shape, settings).to(problem.device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
    batches = train_batches(
        features.n_frames[fold.train], settings.batch, task.batches_by_length, settings.seed
    )
    drawn = (fold.train[places] for places in batches)
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    best: dict[str, Any] | None = None
    state = copy.deepcopy(probe.state_dict())
    skipped = 0
    for step in range(1, settings.steps + 1):
        loss = _update(probe, optimizer, problem, settings, drawn)
        skipped = 0 if loss is not None else skipped + 1
        if skipped >= _MAX_SKIPPED:
            break
        losses += [] if loss is None else [loss]
        if step % settings.evaluate_every == 0 or step == settings.steps:
            scores, _ = evaluate(probe, problem, fold.dev, settings.batch)
            train_loss = float(np.mean(losses)) if losses else None
            line = {"step": step, "train_loss": train_loss, **_prefixed(scores)}
            curve.append(line)
            losses = []
            if best is None or _better(line, best, task):
                best, state = line, copy.deepcopy(probe.state_dict())
        if progress is not None:
            progress(step, settings.steps)
    probe.load_state_dict(state)
    test, hypotheses = None, []
    if best is not None:
        test, hypotheses = evaluate(probe, problem, fold.test, settings.batch)
    return Fitted(
        curve=curve,
        best=best,
        test=test,
        hypotheses=hypotheses,
        layer_weights=probe.layer_weights,
        n_weights=sum(p.numel() for p in probe.parameters()),
        diverged=skipped >= _MAX_SKIPPED,
        seconds=time.perf_counter() - began,
    )


def _update(
    probe: Probe,
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    settings: ProbeSettings,
    batches: Iterator[Sequence[int]],
) -> float | None:
    """One update; the mean loss, or None where the gradient is not finite and nothing changed."""
    probe.train()
    optimizer.zero_grad()
    total = 0.0
    for _ in range(settings.accumulate):
        layers, lengths, answers = problem.batch(next(batches))
        loss = problem.task.loss(probe(layers, lengths), lengths, answers)
        (loss / settings.accumulate).backward()
        total += loss.item() / settings.accumulate
    norm = torch.nn.utils.clip_grad_norm_(probe.parameters(), settings.clip_norm)
    if not (math.isfinite(total) and torch.isfinite(norm)):
        return None
    optimizer.step()
    return total


@torch.no_grad()
def evaluate(
    probe: Probe, problem: Problem, utterances: NDArray[np.int64], batch: int
) -> tuple[dict[str, Any], list[str]]:
    """Loss (mean over utterances) and scores of some utterances, and the answers in their order."""
    probe.eval()
    task = problem.task
    hypotheses = [""] * len(utterances)
    order = np.argsort(problem.features.n_frames[utterances], kind="stable")
    total = 0.0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        layers, lengths, answers = problem.batch(utterances[chosen])
        logits = probe(layers, lengths)
        total += len(chosen) * task.loss(logits, lengths, answers).item()
        for place, hypothesis in zip(chosen, task.read(logits, lengths)):
            hypotheses[place] = hypothesis
    references = [problem.data.answers[i] for i in utterances]
    return {"loss": total / len(utterances), **task.score(hypotheses, references)}, hypotheses


def train_batches(
    n_frames: NDArray[np.int64], batch: int, by_length: bool, seed: int
) -> Iterator[list[int]]:
    """Places of batches without end, every utterance once an epoch.

    Args:
        n_frames: (N,) lengths.
        batch: utterances in a batch; the last of an epoch may have fewer.
        by_length: neighbours in length are always together, and the batches are shuffled; else
            the utterances are.
        seed: of the order.
    """
    draws = np.random.default_rng(seed)
    by_size = np.argsort(n_frames, kind="stable")
    starts = np.arange(0, len(n_frames), batch)
    while True:
        order = by_size if by_length else draws.permutation(len(n_frames))
        for start in draws.permutation(starts) if by_length else starts:
            yield order[start : start + batch].tolist()


def _prefixed(scores: dict[str, Any]) -> dict[str, Any]:
    return {f"dev_{name}": value for name, value in scores.items()}


def _better(line: dict[str, Any], best: dict[str, Any], task: Task) -> bool:
    return merit(line, task, "dev_") > merit(best, task, "dev_")


def merit(scores: dict[str, Any], task: Task, prefix: str = "") -> tuple[float, ...]:
    """What is larger for the better of two sets of scores; None and NaN are worst."""
    score, loss = (scores[prefix + name] for name in (task.scores[0], "loss"))
    worst = -math.inf if task.higher_is_better else math.inf
    score, loss = worst if score is None else score, math.inf if loss is None else loss
    signed = score if task.higher_is_better else -score
    return tuple(v if math.isfinite(v) else -math.inf for v in (signed, -loss))
