"""Density-adaptive attention over time (DAAM).

The real frames of a channel are cut into 4 consecutive chunks of T // 4 (the last takes the
rest). In a chunk, with offsets o_g and widths c_g of its own for g = 1..4:

    m, v  = mean and unbiased variance over the chunk's time, std = sqrt(v + 1e-8)
    y_g   = clamp((x - (m + o_g)) / std, -10, 10)
    c     = clamp(c_g, 0.01, 10),  c2 = c^2 + 1e-8
    L     = sum_g -y_g^2 / (2 c2)
    out   = x + x * softmax_time(L)

The published L carries each Gaussian's normaliser as well, and its softmax is exp(L - logsumexp L).
The normalisers are constant over time and cancel; in silent channels, where L reaches -1e5, the
subtraction loses 5 of 16 digits (so measured in float64, in the gradients) and softmax none.

Below 8 frames the unbiased variance of a chunk is undefined (a chunk of one frame) or the chunk
is empty: there DAAM is the identity. y_g is rounded in the published order, which shows in single
gradients of silent channels (std about 2e-3).

On CUDA a kernel takes x of 16 bits, too, computes in float32 and rounds once; elsewhere x is
widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmm_jepa.ops.checks import check_sequence, check_shapes
from gmm_jepa.ops.fused import takes_kernel, takes_one_op
from gmm_jepa.ops.lengths import check_lengths
from gmm_jepa.ops.operator import Operator

CHUNKS = 4
"""Into which the real frames of a row are cut."""
GAUSSIANS = 4
"""Of each chunk."""
MIN_FRAMES = 2 * CHUNKS
"""Below this many real frames a row passes unchanged."""

_HIDDEN = -1e30
"""Log-density of slots without a frame: finite, so that a chunk of none has finite gradients."""


def density_attention(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, *, lengths_frames: Tensor | None = None
) -> Tensor:
    """x + x softmax over a chunk's time of the summed log-densities of its Gaussians.

    Args:
        x: (B, T, C) float; frames beyond a row's length are zero. Arithmetic is float32, or
            float64 if x is.
        offsets: (4, 4) means of the Gaussians of each chunk, relative to the chunk's mean.
        squared_widths: (4, 4) their variances, positive, in units of the chunk's.
        lengths_frames: (B,) int64, real frames of each row; None: all.

    Returns:
        (B, T, C) of x's dtype; rows of fewer than 8 frames are as they were.

    Raises:
        InputError: shapes or devices make no sense.
    """
    check_sequence(x)
    names = ("offsets", "squared_widths")
    check_shapes(x, names, (offsets, squared_widths), ((CHUNKS, GAUSSIANS),) * 2)
    check_lengths(lengths_frames, x)
    if takes_kernel(x):
        return _density_attention(x, offsets, squared_widths, lengths_frames)
    form = _density_attention if takes_one_op(x) else density_attention_reference
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return form(wide, offsets, squared_widths, lengths_frames).to(x.dtype)


def density_attention_reference(
    x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor | None
) -> Tensor:
    """`density_attention` in plain torch."""
    if x.shape[1] < MIN_FRAMES or not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    if lengths_frames is None:
        return _whole(x, offsets, squared_widths).to(x.dtype).contiguous()
    return _ragged(x, offsets, squared_widths, lengths_frames).to(x.dtype).contiguous()


def _whole(x: Tensor, offsets: Tensor, squared_widths: Tensor) -> Tensor:
    n_frames = x.shape[1]
    size = n_frames // CHUNKS
    chunks = x.split([size] * (CHUNKS - 1) + [n_frames - (CHUNKS - 1) * size], dim=1)
    weights = [
        _density_weights(chunk, *gaussians)
        for chunk, *gaussians in zip(chunks, offsets, squared_widths)
    ]
    return x + x * torch.cat(weights, dim=1)


def _ragged(x: Tensor, offsets: Tensor, squared_widths: Tensor, lengths_frames: Tensor) -> Tensor:
    """Each row is dealt out to 4 chunks of equal room, weighed, and dealt back."""
    size = (lengths_frames // CHUNKS)[:, None]  # (B, 1), frames of all chunks but the last
    room = x.shape[1] // CHUNKS + CHUNKS - 1  # no chunk is longer
    slots = torch.arange(room, device=x.device)
    frames = torch.arange(x.shape[1], device=x.device)
    weights = torch.zeros_like(x)
    for chunk, gaussians in enumerate(zip(offsets, squared_widths)):
        start = chunk * size
        stop = start + size if chunk < CHUNKS - 1 else lengths_frames[:, None]
        index = (start + slots).clamp(max=x.shape[1] - 1)  # (B, room)
        taken = start + slots < stop
        dealt = x.gather(1, _over_channels(index, x))
        weight = _density_weights(dealt, *gaussians, taken[..., None])
        back = (frames - start).clamp(0, room - 1)
        inside = (frames >= start) & (frames < stop)
        returned = weight.gather(1, _over_channels(back, x))
        weights = torch.where(inside[..., None], returned, weights)
    long_enough = (lengths_frames >= MIN_FRAMES)[:, None, None]
    return torch.where(long_enough, x + x * weights, x)


def _density_weights(
    chunk: Tensor, offsets: Tensor, squared_widths: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Softmax over time of the summed log-densities of one chunk, up to their constants.

    Args:
        chunk: (B, T, C)
        offsets: (G,)
        squared_widths: (G,)
        valid: (B, T, 1) bool, frames that exist; None: all. Others get weight zero.

    Returns:
        (B, T, C), positive, summing to one over the chunk's real frames.
    """
    if valid is None:
        mean = chunk.mean(dim=1, keepdim=True)
        variance = chunk.var(dim=1, keepdim=True)
    else:
        count = valid.sum(dim=1, keepdim=True)
        mean = chunk.masked_fill(~valid, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
        centred = (chunk - mean).masked_fill(~valid, 0)
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    std = (variance + 1e-8).sqrt()
    log_density = torch.zeros_like(chunk)
    for offset, squared_width in zip(offsets, squared_widths):
        y = ((chunk - (mean + offset)) / std).clamp(-10.0, 10.0)
        log_density = log_density - y.square() / (2 * squared_width)
    if valid is not None:
        log_density = log_density.masked_fill(~valid, _HIDDEN)
    return log_density.softmax(dim=1)


def _over_channels(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[2])


def density_attention_backward_reference(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    squared_widths: Tensor,
    lengths_frames: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, offsets and squared widths, in plain torch, chunk by chunk."""
    d_x = grad.clone(memory_format=torch.contiguous_format)
    d_offsets, d_widths = torch.zeros_like(offsets), torch.zeros_like(offsets)
    lengths = [x.shape[1]] * len(x) if lengths_frames is None else lengths_frames.tolist()
    for row, n_frames in enumerate(lengths):
        size = n_frames // CHUNKS
        for chunk in range(CHUNKS if n_frames >= MIN_FRAMES else 0):
            frames = slice(chunk * size, (chunk + 1) * size if chunk < CHUNKS - 1 else n_frames)
            v, g = x[row, frames], grad[row, frames]
            c2 = squared_widths[chunk, :, None, None]
            mean, std = v.mean(0), (v.var(0) + 1e-8).sqrt()
            u = (v - (mean + offsets[chunk, :, None, None])) / std  # (G, n, C)
            y = u.clamp(-10.0, 10.0)
            w = (-y.square() / (2 * c2)).sum(0).softmax(0)
            of_density = w * (g * v - (w * g * v).sum(0))
            of_u = torch.where(y == u, -of_density * y / c2, 0.0)
            d_offsets[chunk] -= (of_u / std).sum((1, 2))
            d_widths[chunk] += (of_density * y.square() / (2 * c2.square())).sum((1, 2))
            total = of_u.sum(0)
            of_mean = -(total / std).sum(0) / len(v)
            of_variance = -(of_u * u).sum((0, 1)) / (2 * std.square())
            d_x[row, frames] += g * w + total / std + of_mean
            d_x[row, frames] += 2 * of_variance * (v - mean) / (len(v) - 1)
    return d_x, d_offsets, d_widths


_density_attention = Operator("gmm_jepa::density_attention", density_attention_reference)
_density_attention_backward = Operator(
    "gmm_jepa::density_attention_backward", density_attention_backward_reference
)


@_density_attention.register_fake
def _(x, offsets, squared_widths, lengths_frames):
    return x.new_empty(x.shape)


@_density_attention_backward.register_fake
def _(grad, x, offsets, squared_widths, lengths_frames):
    return tuple(t.new_empty(t.shape) for t in (x, offsets, squared_widths))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _vjp(ctx, grad):
    return *_density_attention_backward(grad, *ctx.saved_tensors), None


_density_attention.register_autograd(_vjp, setup_context=_setup)
