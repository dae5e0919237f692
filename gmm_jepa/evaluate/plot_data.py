"""What the report's pictures draw, as arrays that can be drawn again.

Names in the archive (``plots/data.npz``):

- ``usage_head``, ``usage_mixture`` (K,): held-out frames per cluster.
- ``transition_clusters`` (M,), ``transitions`` (M, M): see `clusters.top_transitions`.
- ``cluster_map`` (K, 3): the mixture's means on their first principal axes, for colours.
- ``scatter_trained``, ``scatter_untrained`` (P, 2), with ``..._phones`` and ``..._clusters`` (P,).
- ``example{i}_...`` for each utterance that is drawn: ``log_mel`` (T, n_mels), ``head``,
  ``mixture``, ``head_entropy``, ``mixture_entropy`` (T,), ``phone_starts``, ``phone_ends``,
  ``phone_symbols``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmm_jepa.data.phone_labels import phone_segments
from gmm_jepa.evaluate.clusters import top_transitions
from gmm_jepa.evaluate.embed import SAMPLE_RATE_HZ, FrameTable, Utterance
from gmm_jepa.evaluate.labels import frame_phones
from gmm_jepa.evaluate.tracks import Tracks

Arrays = dict[str, NDArray[Any]]

SCATTER_FRAMES = 4000
N_EXAMPLES = 3
EXAMPLE_S = 3.5
"""Length that drawn utterances come close to."""
LONGEST_EXAMPLE_S = 6.0


def clusters(tracks: Tracks, offsets: NDArray[np.int64], centres: Tensor, *, top: int) -> Arrays:
    """Usage of head and targets, transitions of the head, and the map of the (K, D) centres."""
    n = len(centres)
    shown, probabilities = top_transitions(tracks.head, offsets, n_clusters=n, top=top)
    means = centres.double().cpu()
    place = principal_axes(means, 3)
    if float((place[:, 0] * (means.mean(1) - means.mean())).sum()) < 0:
        place[:, 0] *= -1  # the first axis is loudness: upwards
    return {
        "usage_head": np.bincount(tracks.head, minlength=n),
        "usage_mixture": np.bincount(tracks.mixture, minlength=n),
        "transition_clusters": shown,
        "transitions": probabilities,
        "cluster_map": place.numpy(),
    }


def scatter(
    table: FrameTable,
    utterances: Sequence[Utterance],
    labels: NDArray[np.int64] | None,
    *,
    name: str,
) -> Arrays:
    """Frames, evenly drawn, on the first two principal axes of all frames.

    Beside them their phones ("" where unknown) and, where `labels` (N,) are given, their clusters.
    """
    values = table.values
    rows = np.unique(np.linspace(0, max(len(values) - 1, 0), SCATTER_FRAMES).astype(np.int64))
    rows = rows[rows < len(values)]
    phones = [
        phone or ""
        for u, utterance in enumerate(utterances)
        for phone in frame_phones(utterance.entry, table.centres_s(u))
    ]
    flat = principal_axes(values, 2)[torch.from_numpy(rows)]
    arrays = {
        f"scatter_{name}": flat.numpy().astype(np.float32),
        f"scatter_{name}_phones": np.array([phones[r] for r in rows], dtype=np.str_),
    }
    return arrays if labels is None else arrays | {f"scatter_{name}_clusters": labels[rows]}


def principal_axes(x: Tensor, n: int) -> Tensor:
    """(N, D) -> (N, n) float64: coordinates on the widest axes, each signed so that it is skewed
    to the positive; zeros where D < n."""
    finite = torch.nan_to_num(x.double())
    centred = finite - finite.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :n]
    flat = torch.zeros(len(x), n, dtype=torch.float64)
    flat[:, : vectors.shape[1]] = centred @ vectors
    return torch.where(flat.pow(3).sum(0) < 0, -flat, flat)


def examples(
    utterances: Sequence[Utterance], z: FrameTable, anchors: FrameTable, tracks: Tracks
) -> tuple[list[dict[str, Any]], Arrays]:
    """A few held-out utterances, drawn whole if they are short, of different speakers if there are.

    Args:
        utterances: U held-out utterances.
        z: the encoder's frames; only their number and place count.
        anchors: the log-mel frames beside them, on which the mixture's posteriors stand.
        tracks: what head and mixture say of the frames.

    Returns:
        What to write over each picture, with the seconds on which the first frames are centred, and
        the arrays.
    """
    described, arrays = [], {}
    for i, u in enumerate(_choose_examples(utterances, z.offsets)):
        utterance = utterances[u]
        hop_s = z.hop_samples / SAMPLE_RATE_HZ
        longest = int(LONGEST_EXAMPLE_S / hop_s)
        rows = slice(z.offsets[u], min(z.offsets[u + 1], z.offsets[u] + longest))
        arrays[f"example{i}_log_mel"] = anchors.values[rows].numpy().astype(np.float16)
        for name in ("head", "mixture", "head_entropy", "mixture_entropy"):
            arrays[f"example{i}_{name}"] = getattr(tracks, name)[rows]
        segments = phone_segments(utterance.entry)
        if segments is not None:
            arrays[f"example{i}_phone_starts"], arrays[f"example{i}_phone_ends"] = segments[:2]
            arrays[f"example{i}_phone_symbols"] = np.array(segments[2], dtype=np.str_)
        described.append(
            {
                "text": str(utterance.entry.get("text") or ""),
                "speaker": utterance.speaker or "",
                "duration_s": len(utterance.waveform) / SAMPLE_RATE_HZ,
                "hop_s": hop_s,
                "mixture_centre_s": anchors.first_centre_samples / SAMPLE_RATE_HZ,
                "head_centre_s": z.first_centre_samples / SAMPLE_RATE_HZ,
            }
        )
    return described, arrays


def _choose_examples(utterances: Sequence[Utterance], offsets: NDArray[np.int64]) -> list[int]:
    """Utterances nearest to the wanted length; new speakers and texts first, then new texts."""
    durations = np.array([len(u.waveform) for u in utterances]) / SAMPLE_RATE_HZ
    order = np.argsort(np.abs(durations - EXAMPLE_S), kind="stable").tolist()
    order = [u for u in order if offsets[u + 1] - offsets[u] > 1]
    chosen: list[int] = []
    for new in (("speaker", "text"), ("text",), ()):
        for u in order:
            known = any(
                utterances[u].entry.get(key) == utterances[c].entry.get(key)
                for key in new
                for c in chosen
            )
            if len(chosen) < N_EXAMPLES and u not in chosen and not known:
                chosen.append(u)
    return chosen
