"""The first two convolutions as one.

Nothing stands between the input convolution (1 -> C, k7) and the first strided one (C -> C',
kernel 2s, stride s), so their taps compose to one kernel of 2s + 6 that goes from the waveform
straight to the first stage's frames. The full-rate signal of C channels, by far the largest
activation of the model, is never made: forward and backward, 8 x 2 s, C = 8, C' = 16, one core,
2 ms instead of 39.

At a row's two ends the pair is not the composed kernel: the strided convolution sees zeros where
the input convolution, had it run on past the end, would have put its bias and the taps that still
reach the signal. Those few positions are computed and taken off, so the result is the pair's to
rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa.models.convolution import FrameConv
from gmm_jepa.models.padding import stage_length
from gmm_jepa.ops import takes_float32, waveform_conv


def stem(
    waveform: Tensor, lengths_samples: Tensor | None, first: FrameConv, strided: FrameConv
) -> Tensor:
    """``strided(first(waveform))`` with zeros between the two wherever a row has no sample.

    Args:
        waveform: (B, S), zero beyond a row's samples; S gives at least one frame.
        lengths_samples: (B,) samples of each row; None: all.
        first: 1 -> C, odd kernel, stride 1, length-preserving.
        strided: C -> C', kernel 2s, stride s, padding s // 2.

    Returns:
        (B, T, C'), its padding frames finite.
    """
    stride, margin = strided.stride, strided.padding
    n_frames = stage_length(waveform.shape[1], stride)
    if lengths_samples is None:
        lengths_samples = waveform.new_full(
            waveform.shape[:1], waveform.shape[1], dtype=torch.int64
        )
    taps, bias = _compose(first, strided)
    taps = F.pad(taps, (0, -taps.shape[1] % 8))  # rows of 16 bytes, which fast products ask for
    left = first.padding + margin
    right = (n_frames - 1) * stride + taps.shape[1] - left - waveform.shape[1]
    padded = F.pad(waveform, (left, right))
    reach = torch.arange(margin + 2 * first.padding, device=waveform.device)
    frames = stage_length(lengths_samples, stride)[:, None]
    start = stride * (frames + 1) - margin  # where in `padded` the last frame's end is made from
    position = start - margin + reach[:margin]  # of the pair's inner signal
    beyond = (position >= lengths_samples[:, None]) & (frames > 0)
    ends = torch.stack([padded[:, : len(reach)], padded.gather(1, start + reach)], dim=1)
    inner = F.linear(ends.unfold(2, 2 * first.padding + 1, 1), first.weight[:, 0], first.bias)
    head, tail = inner.unbind(dim=1)  # (B, margin, C) each
    tail = tail * beyond[..., None]
    head = _contract(head, strided.weight[..., :margin])
    tail = _contract(tail, strided.weight[..., 2 * stride - margin :])
    last = (frames[:, 0] - 1).clamp(min=0)
    if takes_float32(padded):
        ends = torch.stack([head, tail], dim=1)
        return waveform_conv(padded, taps, bias, ends, last, stride=stride)
    y = F.linear(padded.unfold(1, taps.shape[1], stride), taps, bias)
    y[:, 0] -= head
    last = last[:, None, None].expand(-1, -1, y.shape[2])
    return y.scatter_add(1, last, -tail[:, None].to(y.dtype))


def _compose(first: FrameConv, strided: FrameConv) -> tuple[Tensor, Tensor]:
    """Taps (C', 2s + k - 1) and bias (C',) of the pair, not rounded by autocast."""
    with torch.autocast(strided.weight.device.type, enabled=False):
        pairs = strided.weight.mT @ first.weight[:, 0]  # (C', 2s, k), of tap j + i each
        n, width = pairs.shape[1], pairs.shape[1] + pairs.shape[2] - 1
        # Rows of width + 1, read as rows of width: row j is moved by j.
        moved = F.pad(pairs, (0, n)).flatten(1)[:, : n * width].unflatten(1, (n, width))
        return moved.sum(dim=1), strided.bias + strided.weight.sum(dim=2) @ first.bias


def _contract(inner: Tensor, weight: Tensor) -> Tensor:
    """(B, P, C) with taps (C', C, P) -> (B, C')."""
    return F.linear(inner.transpose(1, 2).flatten(1), weight.flatten(1))
