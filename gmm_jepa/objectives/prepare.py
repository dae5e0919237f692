"""From rows of audio to what the objective takes: masks, noise and the weight of every frame.

Everything is drawn from (seed, step, row of the global batch), so that it depends neither on the
number of processes nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from gmm_jepa.config import ObjectiveConfig
from gmm_jepa.data.audio import SAMPLE_RATE_HZ
from gmm_jepa.data.loader import Batch, RankView
from gmm_jepa.objectives.augmentation import disturb_into
from gmm_jepa.objectives.batch import MaskedBatch
from gmm_jepa.objectives.masks import draw_mask, masked_count

_MASK, _NOISE = 0, 1  # separate streams of random numbers


class MaskAndDisturb:
    """Draws masks and noise for this process's rows; runs in the workers.

    Of the others' rows it draws how many frames they mask, which the weights of all depend on.

    Args:
        config: shares, spans and probabilities.
        n_frames: encoder frames of a number of samples.
        seed: of the run, under 2^32.
    """

    def __init__(
        self, config: ObjectiveConfig, n_frames: Callable[[int], int], *, seed: int
    ) -> None:
        self.config = config
        self.n_frames = n_frames
        self.seed = seed

    def __call__(self, view: RankView) -> dict[str, Any]:
        """Extras of one batch.

        Returns:
            ``disturbed`` (R, S) float32; ``mask`` and ``real`` (R, T) bool; ``n_masked`` and
            ``n_visible``, frames in the global batch as planned; ``audio_s``, its seconds.
        """
        planned, held = view.lengths_samples.tolist(), view.held_samples.tolist()
        frames = {n: self.n_frames(n) for n in {*planned, *held}}
        lengths = [frames[n] for n in planned]
        n_frames = self.n_frames(view.waveform.shape[1])
        mask = np.zeros((len(held), n_frames), dtype=bool)
        places = {row: place for place, row in enumerate(view.rows.tolist())}
        n_masked = 0
        for row, length in enumerate(lengths):
            rng = self._rng(view.step, row, _MASK)
            count = masked_count(length, rng, share=self.config.mask_share)
            n_masked += count
            if row in places:
                spans = self.config.mask_span_frames
                mask[places[row], :length] = draw_mask(length, count, rng, span_frames=spans)
        real = np.arange(n_frames) < np.array([frames[n] for n in held])[:, None]
        disturbed = view.empty(view.waveform.shape)
        for place, (row, n_samples) in enumerate(zip(view.rows.tolist(), held)):
            self._disturb(disturbed[place, :n_samples], view, row, place)
            disturbed[place, n_samples:] = 0
        return {
            "disturbed": disturbed,
            "mask": mask & real,
            "real": real,
            "n_masked": n_masked,
            "n_visible": sum(lengths) - n_masked,
            "audio_s": float(view.lengths_samples.sum()) / SAMPLE_RATE_HZ,
        }

    def _disturb(self, out: np.ndarray, view: RankView, row: int, place: int) -> None:
        """Write a row (n,), with what is drawn for it."""
        disturb_into(
            out,
            view.waveform[place, : len(out)],
            self._rng(view.step, row, _NOISE),
            n_rows=view.n_rows,
            row=row,
            read_row=view.read_row,
            mix_probability=self.config.mix_probability,
            noise_probability=self.config.noise_probability,
        )

    def _rng(self, step: int, row: int, stream: int) -> np.random.Generator:
        # A list gives the same numbers, and takes three times as long.
        return np.random.default_rng(np.array([self.seed, step, row, stream], np.uint32))


def micro_batches(batch: Batch, n_parts: int, *, unmasked_weight: float) -> Iterator[MaskedBatch]:
    """Cut a batch into `n_parts` runs of rows, each with the weights of its frames.

    The weights are normalised over the global batch: masked frames share one part, frames in sight
    `unmasked_weight` parts, together 1 (so the losses of all parts and processes add up).
    """
    extras = batch.extras
    mask, real = extras["mask"], extras["real"]
    n_masked, n_visible = max(extras["n_masked"], 1), max(extras["n_visible"], 1)
    predicted = mask.float() / n_masked
    in_sight = real & ~mask
    visible = in_sight.float() * (unmasked_weight / n_visible)
    anchored = (predicted + visible) / (1.0 + unmasked_weight)
    n_rows = -(-len(mask) // n_parts)
    for first in range(0, len(mask), n_rows):
        part = slice(first, first + n_rows)
        yield MaskedBatch(
            batch.waveform[part],
            extras["disturbed"][part],
            batch.lengths_samples[part],
            ~mask[part],
            *_weighted(predicted[part]),
            *_weighted(anchored[part]),
            in_sight[part].flatten().nonzero().squeeze(1),
        )


def _weighted(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Places and values of the weights that are not zero, in flattened (R, T)."""
    flat = weights.flatten()
    places = flat.nonzero().squeeze(1)
    return places, flat[places]
