"""Frozen features of a sample of utterances: encoder layers, its output, or log-mel frames.

All frames of a sample lie end to end in one table (N, D), so that a measure is one expression and a
probe takes rows. Memory is the table and one batch of audio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.windows import draw_utterances
from gmm_jepa.errors import InputError
from gmm_jepa.features import LogMelSpec, log_mel
from gmm_jepa.models import Encoder, JepaModel


@dataclass(frozen=True)
class Utterance:
    """One utterance of the sample that is evaluated."""

    waveform: NDArray[np.float32]
    """(S,) mono, 16 kHz."""
    entry: dict[str, Any]
    """What the manifest says about it."""
    heldout: bool
    """From the held-out corpus."""

    @property
    def speaker(self) -> str | None:
        """Name of the speaker, if the manifest has one."""
        speaker = self.entry.get("speaker")
        return None if speaker is None else str(speaker)


@dataclass(frozen=True)
class FrameTable:
    """Frames of utterances laid end to end."""

    values: Tensor
    """(N, D) float32 on the CPU."""
    offsets: NDArray[np.int64]
    """(U + 1,): utterance u owns the rows offsets[u]:offsets[u + 1]."""
    hop_samples: int
    """Samples from one frame's centre to the next one's."""
    first_centre_samples: float
    """Sample on which frame 0 of an utterance is centred."""

    def rows(self, u: int) -> Tensor:
        """(T, D) frames of utterance u, a view."""
        return self.values[self.offsets[u] : self.offsets[u + 1]]

    def centres_s(self, u: int) -> NDArray[np.float64]:
        """(T,) seconds from the start of utterance u to the centres of its frames."""
        frames = np.arange(self.offsets[u + 1] - self.offsets[u])
        return (self.hop_samples * frames + self.first_centre_samples) / SAMPLE_RATE_HZ

    def pooled(self) -> Tensor:
        """(U, D) mean over the frames of each utterance; 0 where it has none."""
        counts = torch.from_numpy(np.diff(self.offsets))
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        total = self.values.new_zeros(len(counts), self.values.shape[1])
        total.index_add_(0, owner, self.values)
        return total / counts.clamp(min=1).unsqueeze(1)


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of the sample."""

    output: FrameTable
    """z: (N, D)."""
    layers: FrameTable
    """All layers side by side, projection first: (N, (L + 1) D)."""
    layer_weights: Tensor
    """(U, L + 1) weights of the aggregation."""


def load_sample(
    corpus: Any, *, max_s: float, seed: int, heldout: bool, longest_s: float = 20.0
) -> tuple[list[Utterance], int]:
    """Read a deterministic sample of a corpus into memory.

    Args:
        corpus: a `gmm_jepa.data.Corpus`.
        max_s: seconds of audio at most.
        seed: of the choice.
        heldout: what to note in the utterances.
        longest_s: of a longer utterance the beginning is taken.

    Returns:
        The utterances that could be read, and the number of those that could not.
    """
    longest = int(longest_s * SAMPLE_RATE_HZ)
    if not len(corpus):
        return [], 0
    heard = np.minimum(np.asarray(corpus.durations_samples), longest)
    chosen = draw_utterances(heard, int(max_s * SAMPLE_RATE_HZ), seed=seed)
    utterances, unreadable = [], 0
    for i in chosen.tolist():
        n_samples = min(int(corpus.durations_samples[i]), longest)
        try:
            waveform = corpus.read(i, 0, n_samples)
        except InputError:
            unreadable += 1
            continue
        utterances.append(Utterance(np.asarray(waveform, np.float32), corpus.entry(i), heldout))
    return utterances, unreadable


def encode(
    encoder: Encoder,
    utterances: Sequence[Utterance],
    *,
    batch_s: float = 32.0,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Features of all utterances, in their order, in evaluation mode, on the encoder's device.

    Args:
        encoder: the encoder; its training mode is put back afterwards.
        utterances: U utterances; similar lengths are batched together.
        batch_s: padded seconds in a batch at most (one utterance may be longer).
        progress: called with samples done and samples in all.
    """
    device = next(encoder.parameters()).device
    lengths = np.array([len(u.waveform) for u in utterances], dtype=np.int64)
    n_frames = np.array([int(encoder.n_frames(int(n))) for n in lengths], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(n_frames)])
    output = layers = weights = None
    was_training, done = encoder.training, 0
    encoder.eval()
    try:
        for batch in length_groups(lengths, batch_s * SAMPLE_RATE_HZ):
            encoded = _encode_batch(encoder, [utterances[u].waveform for u in batch], device)
            if output is None:
                width = encoded.output.shape[-1]
                output = torch.empty(offsets[-1], width)
                layers = torch.empty(offsets[-1], width * len(encoded.layers))
                weights = torch.empty(len(utterances), len(encoded.layers))
            together = torch.cat(encoded.layers, dim=-1).float().cpu()
            z, layer_weights = encoded.output.float().cpu(), encoded.layer_weights.float().cpu()
            for row, u in enumerate(batch):
                rows = slice(offsets[u], offsets[u + 1])
                output[rows] = z[row, : n_frames[u]]
                layers[rows] = together[row, : n_frames[u]]
                weights[u] = layer_weights[row]
            done += int(lengths[batch].sum())
            if progress is not None:
                progress(done, int(lengths.sum()))
    finally:
        encoder.train(was_training)
    if output is None or layers is None or weights is None:
        raise InputError("nothing to encode: the sample holds no utterance")
    place = (int(encoder.hop_samples), float(encoder.frame_centre_samples))
    return Encoded(
        FrameTable(output, offsets, *place), FrameTable(layers, offsets, *place), weights
    )


@torch.inference_mode()
def _encode_batch(
    encoder: Encoder, waveforms: Sequence[NDArray[np.float32]], device: torch.device
) -> Any:
    longest = max(len(w) for w in waveforms)
    waveform = torch.zeros(len(waveforms), longest)
    for row, samples in enumerate(waveforms):
        waveform[row, : len(samples)] = torch.from_numpy(samples)
    lengths = torch.tensor([len(w) for w in waveforms])
    return encoder(waveform.to(device), lengths.to(device))


def length_groups(lengths: NDArray[np.int64], limit: float) -> list[list[int]]:
    """Places grouped by length, longest first: the largest group fails first, if any.

    A group's padded length stays under `limit`; one that is longer stands alone.
    """
    groups: list[list[int]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def log_mel_table(
    utterances: Sequence[Utterance],
    spec: LogMelSpec,
    n_frames: NDArray[np.int64],
    *,
    shift_samples: int = 0,
) -> FrameTable:
    """Log-mel frames, cut to the first `n_frames[u]` of each utterance.

    A row that has fewer repeats its last frame, so that the tables of encoder and front end match
    frame by frame; with the front end's `samples // hop + 1` frames this does not happen unless
    `shift_samples` drops the start.
    """

    def frames_of(waveform: Tensor) -> Tensor:
        return log_mel(waveform, spec=spec, shift_samples=shift_samples)

    values, offsets = _laid_end_to_end(utterances, n_frames, frames_of)
    return FrameTable(values, offsets, spec.hop_samples, float(shift_samples))


def target_frames(
    utterances: Sequence[Utterance],
    make: Callable[[Tensor, Tensor, int], Tensor],
    n_frames: NDArray[np.int64],
    device: torch.device,
) -> Tensor:
    """(N, D) float32 on the CPU: what targets are made of, frame by frame beside the encoder's.

    Args:
        utterances: U utterances.
        make: the frames of `Targets`, on `device`.
        n_frames: (U,) frames of the encoder; a row that has fewer repeats its last one.
        device: where they are made.
    """

    def frames_of(waveform: Tensor) -> Tensor:
        length = torch.tensor([len(waveform)], device=device)
        n = len(waveform)  # more than there are: all of them
        return make(waveform[None].to(device), length, n)[0].float().cpu()

    return _laid_end_to_end(utterances, n_frames, frames_of)[0]


def head_frames(model: JepaModel, z: Tensor, head_input: str) -> Tensor:
    """What the cluster head reads of unmasked z (B, T, D), the same shape.

    Args:
        model: in eval mode.
        z: the encoder's output, all frames real.
        head_input: "encoder" or "predictor", see `ObjectiveConfig.head_input`.
    """
    return model.predict(z, None) if head_input == "predictor" else z


@torch.inference_mode()
def heard_frames(model: JepaModel, z: FrameTable, head_input: str) -> Tensor:
    """(N, D) float32 on the CPU: `head_frames` of every utterance, in eval mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = [z.rows(u) for u in range(len(z.offsets) - 1)]
    heard = [head_frames(model, row[None].to(device), head_input)[0].float().cpu() for row in rows]
    model.train(was_training)
    return torch.cat(heard)


def _laid_end_to_end(
    utterances: Sequence[Utterance],
    n_frames: NDArray[np.int64],
    frames_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, NDArray[np.int64]]:
    """Frames (N, D) of all utterances and their offsets (U + 1,)."""
    offsets = np.concatenate([[0], np.cumsum(n_frames)])
    values = None
    for u, utterance in enumerate(utterances):
        if not n_frames[u]:
            continue
        frames = frames_of(torch.from_numpy(utterance.waveform))
        if values is None:
            values = torch.zeros(int(offsets[-1]), frames.shape[1])
        take = torch.arange(int(n_frames[u])).clamp(max=len(frames) - 1)
        values[offsets[u] : offsets[u + 1]] = frames[take]
    return torch.zeros(0, 0) if values is None else values, offsets


def with_context(table: FrameTable, context: int) -> FrameTable:
    """Each frame beside `context` frames before and after it; the ends repeat: (N, (2c + 1) D)."""
    starts, lengths = table.offsets[:-1], np.diff(table.offsets)
    first = torch.from_numpy(np.repeat(starts, lengths))
    last = torch.from_numpy(np.repeat(starts + lengths - 1, lengths))
    here = torch.arange(len(table.values))
    parts = [
        table.values[torch.minimum(torch.maximum(here + step, first), last)]
        for step in range(-context, context + 1)
    ]
    values = torch.cat(parts, dim=1)
    return FrameTable(values, table.offsets, table.hop_samples, table.first_centre_samples)
