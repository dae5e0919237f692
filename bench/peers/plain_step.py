"""One training step of the published recipe in plain eager PyTorch.

What a competent user would write from the paper and no more: torchaudio's log-mel, posteriors in
chunks, the cluster head over all frames, augmentation utterance by utterance in Python, the
teacher updated parameter by parameter, the loss read back at every step. Utterances of a batch are
equally long. With augmentation and dropout off its losses equal the package's to rounding, which
`bench.train` checks before it measures.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor, nn

from bench.peers.plain_model import PlainEncoder, PlainStudent
from gmm_jepa.models import ConformerConfig

POSTERIOR_CHUNK = 4096
"""Frames at a time, so that (frames, K, D) differences never exist."""


@dataclass(frozen=True)
class PlainMixture:
    """A diagonal mixture as three tensors."""

    means: Tensor
    """(K, D)"""
    variances: Tensor
    """(K, D)"""
    weights: Tensor
    """(K,)"""

    def posteriors(self, frames: Tensor, temperature: float) -> Tensor:
        """(N, D) -> (N, K), float32, chunk by chunk."""
        precision = 1 / self.variances
        constant = torch.log(self.weights) - 0.5 * (
            torch.log(2 * math.pi * self.variances).sum(1)
            + (self.means.square() * precision).sum(1)
        )
        parts = []
        for chunk in frames.split(POSTERIOR_CHUNK):
            quadratic = chunk.square() @ precision.T - 2 * chunk @ (self.means * precision).T
            parts.append(torch.softmax((constant - 0.5 * quadratic) / temperature, dim=-1))
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """What of the recipe the step needs."""

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    teacher_decay: float = 0.996
    temperature: float = 1.0
    unmasked_weight: float = 0.0
    augment: bool = True
    autocast: bool = False
    """bf16 autocast for student and teacher"""


class PlainStep:
    """Student, teacher, optimiser and the step that trains them.

    Args:
        config: of the encoder.
        mixture: the frozen anchor, on the device.
        settings: of the recipe.
        device: where everything lives.
    """

    def __init__(
        self,
        config: ConformerConfig,
        mixture: PlainMixture,
        settings: PlainSettings,
        device: torch.device,
    ) -> None:
        self.settings, self.mixture, self.device = settings, mixture, device
        self.student = PlainStudent(config, len(mixture.weights)).to(device)
        self.teacher = PlainEncoder(config).to(device).requires_grad_(False).eval()
        self.mel = torchaudio.transforms.MelSpectrogram(
            16_000, n_fft=400, hop_length=config.hop_samples, n_mels=mixture.means.shape[1]
        ).to(device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.random = random.Random(0)

    def load(self, checkpoint: dict[str, dict[str, Tensor]]) -> None:
        """Take the weights of a checkpoint in the published layout."""
        copies = ("conformers", "predictor")

        def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: tensor
                for name, tensor in state.items()
                if not (name.startswith(copies) and "rel_pos_bias" in name)
            }

        self.student.load_state_dict(own(copy.deepcopy(checkpoint["online"])))
        self.teacher.load_state_dict(own(copy.deepcopy(checkpoint["target"])))

    def losses(self, clean: Tensor, keep: Tensor, anchor_weight: float) -> Tensor:
        """Total loss of a batch.

        Args:
            clean: (B, S) float32 waveforms, all S samples real.
            keep: (B, T) bool, False where masked.
            anchor_weight: lambda.
        """
        settings = self.settings
        disturbed = self._augment(clean) if settings.augment else clean
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.autocast):
            with torch.no_grad():
                target = self.teacher(clean)
            z = self.student(disturbed)
            predicted = self.student.predict(z, keep)
            logits = self.student.cluster_head(z)
        n_frames = z.shape[1]
        with torch.no_grad():
            frames = torch.log(self.mel(clean) + 1e-6).transpose(1, 2)[:, :n_frames]
            posteriors = self.mixture.posteriors(frames.flatten(0, 1), settings.temperature)
        masked = (~keep).float()
        squared = (predicted.float() - target.float()).square().mean(dim=-1)
        jepa = (squared * masked).sum() / masked.sum()
        log_q = torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)
        kl = nn.functional.kl_div(log_q, posteriors, reduction="none").sum(-1).view_as(masked)
        anchor = (kl * masked).sum() / masked.sum()
        if settings.unmasked_weight:
            visible = 1 - masked
            seen = (kl * visible).sum() / visible.sum()
            weight = settings.unmasked_weight
            anchor = (anchor + weight * seen) / (1 + weight)
        return jepa + anchor_weight * anchor

    def __call__(self, clean: Tensor, keep: Tensor, anchor_weight: float) -> float:
        """Train on one batch (arguments as in `losses`) and return its loss."""
        loss = self.losses(clean, keep, anchor_weight)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        decay = self.settings.teacher_decay
        with torch.no_grad():
            online = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.mul_(decay).add_(online[name], alpha=1 - decay)
        return loss.item()

    def _augment(self, clean: Tensor) -> Tensor:
        """Mix in another utterance or add noise, a quarter of the utterances each."""
        disturbed = clean.clone()
        n_rows, n_samples = clean.shape
        for row in range(n_rows):
            draw = self.random.random()
            if draw >= 0.5 or n_rows < 2:
                continue
            other = clean[(row + self.random.randrange(1, n_rows)) % n_rows]
            if draw < 0.25:
                length = self.random.randrange(1, n_samples // 2 + 1)
                ratio_db = self.random.uniform(-5, 5)
            else:
                length, ratio_db = n_samples, self.random.uniform(-5, 20)
            start = self.random.randrange(n_samples - length + 1)
            offset = self.random.randrange(n_samples - length + 1)
            added = other[offset : offset + length]
            power, added_power = clean[row].square().mean(), added.square().mean()
            gain = torch.sqrt(power / (added_power * 10 ** (ratio_db / 10) + 1e-10))
            disturbed[row, start : start + length] += gain * added
        return disturbed
