"""Figures of a training, summed on the device and read back when a line of metrics is due."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.distributed import Processes
from gmm_jepa.errors import InputError
from gmm_jepa.objectives.batch import Losses
from gmm_jepa.objectives.meters import embedding_meters, usage_entropy

MAX_BAD_STEPS = 10


class Meters:
    """Collects a run's figures on the device and reads them back only when a line is due.

    Args:
        peers: the processes whose figures are added up.
        parts: names of the parts of the loss, as the objective gives them.
        n_clusters: size of the cluster head; 0 without one.
    """

    def __init__(self, peers: Processes, parts: Sequence[str], n_clusters: int) -> None:
        self._peers = peers
        self._parts = tuple(parts)
        self._usage = torch.zeros(n_clusters, device=peers.device)
        self._skipped = torch.zeros((), device=peers.device)
        self._streak = torch.zeros((), device=peers.device)
        self._worst_streak = torch.zeros((), device=peers.device)
        self._restart()

    def _restart(self) -> None:
        self._sums = torch.zeros(1 + len(self._parts), device=self._peers.device)
        self._usage.zero_()
        self._worst_streak.zero_()
        self._n_steps, self._audio_s, self._waited_s = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def add_losses(self, losses: Losses) -> None:
        """Take in one micro-batch; nothing is read back."""
        parts = [losses.parts[name] for name in self._parts]
        self._sums += torch.stack([losses.total.detach(), *parts])
        if losses.clusters is not None:
            ones = torch.ones_like(losses.clusters, dtype=self._usage.dtype)
            self._usage.scatter_add_(0, losses.clusters, ones)
        self._embeddings = losses.embeddings

    def add_step(self, norm: Tensor, bad: Tensor, *, audio_s: float, waited_s: float) -> None:
        """Take in one optimiser step.

        Args:
            norm: () gradient norm before clipping.
            bad: () 1.0 where the step was skipped for a norm that is not finite, else 0.0.
            audio_s: seconds of audio in the global batch.
            waited_s: seconds spent waiting for it.
        """
        self._norm = norm
        self._skipped += bad
        self._streak = (self._streak + bad) * bad
        self._worst_streak = torch.maximum(self._worst_streak, self._streak)
        self._n_steps += 1
        self._audio_s += audio_s
        self._waited_s += waited_s

    def read(self) -> dict[str, float]:
        """Means since the last reading, as plain numbers; waits for the device.

        Raises:
            InputError: ten steps in a row were not finite.
        """
        peers = self._peers
        means = (peers.add(self._sums.clone()) / self._n_steps).tolist()
        usage = peers.add(self._usage.clone())
        elapsed = time.perf_counter() - self._since
        values = {
            **dict(zip(("loss", *self._parts), means)),
            "gradient_norm": self._norm.item(),
            "skipped_steps": int(self._skipped),
            "audio_s_per_s": self._audio_s / elapsed,
            "wait_share": self._waited_s / elapsed,
            **_embedding_figures(self._embeddings),
        }
        if len(usage):
            values["usage_entropy"] = usage_entropy(usage).item()
        if self._worst_streak >= MAX_BAD_STEPS:
            raise InputError(
                f"the gradient was not finite in {MAX_BAD_STEPS} steps in a row: "
                "lower the learning rate or look at the audio; the last checkpoint is whole"
            )
        self._restart()
        return values

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, so that the next line is the same after a resume.

        Called by every process, since each has sums of its own.
        """
        return {
            "sums": self._peers.gather([self._sums.cpu()]),
            "usage": self._peers.gather([self._usage.cpu()]),
            "skipped": self._skipped.cpu(),
            "streak": self._streak.cpu(),
            "worst_streak": self._worst_streak.cpu(),
            "n_steps": self._n_steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; of another number of processes, the main one takes all sums."""
        for name in ("skipped", "streak", "worst_streak"):
            getattr(self, f"_{name}").copy_(state[name])
        for name in ("sums", "usage"):
            parts, own = state[name], getattr(self, f"_{name}")
            if len(parts) == self._peers.world_size:
                own.copy_(parts[self._peers.rank])
            elif self._peers.is_main:
                own.copy_(torch.stack(parts).sum(0))
        self._n_steps = state["n_steps"]


def _embedding_figures(embeddings: dict[str, Tensor]) -> dict[str, float]:
    """Collapse meters of every layer under its name, and the cosine of teacher and student."""
    found = {name: values.float() for name, values in embeddings.items()}
    figures = {
        f"{name}_{meter}": value.item()
        for name, values in found.items()
        for meter, value in embedding_meters(values).items()
    }
    if "teacher" in found:
        cosine = F.cosine_similarity(found["online"], found["teacher"], dim=-1).mean()
        figures["teacher_cosine"] = cosine.item()
    return figures
