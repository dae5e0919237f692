"""Named cases of the operators of a conformer block's parts, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmm_jepa import ops

EPSILON = 1e-5


def feed_forward(
    x: Tensor, *parameters: Tensor, scale: float = 0.5, dropout_p: float = 0.0
) -> Tensor:
    return ops.feed_forward(x, *parameters, scale=scale, epsilon=EPSILON, dropout_p=dropout_p)


def feed_forward_in_torch(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    *norm: Tensor,
    scale: float,
    keep: tuple[Tensor | float, ...] = (1.0, 1.0),
) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], *norm, eps=EPSILON) if norm else x
    y = F.linear(keep[0] * F.gelu(F.linear(y, up, up_bias)), down, down_bias)
    return x + scale * keep[1] * y


def self_attention(
    x: Tensor, *weights: Tensor, lengths: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    named = ops.AttentionWeights(*weights)
    return ops.self_attention(x, named, lengths_frames=lengths, dropout_p=dropout_p)


def self_attention_in_torch(
    x: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    table: Tensor,
    gate_u: Tensor,
    gate_r: Tensor,
    gate_scale: Tensor,
    *,
    lengths: Tensor | None,
    keep: tuple[Tensor | float, ...] = (1.0,),
) -> Tensor:
    position = torch.arange(x.shape[1])
    made = F.linear(x, qkv, qkv_bias).unflatten(-1, (3, len(gate_scale), -1))
    q, k, v = made.permute(2, 0, 3, 1, 4)
    u, r = (torch.sigmoid((q * g[:, None]).sum(-1, keepdim=True)) for g in (gate_u, gate_r))
    gate = 1 + u + (1 - u) * r * gate_scale[:, None, None]
    relative = position - position[:, None] + len(position) - 1
    scores = q @ k.mT / q.shape[-1] ** 0.5 + table[:, relative] * gate
    if lengths is not None:
        hidden = position >= lengths.clamp(min=1)[:, None, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    attended = (keep[0] * scores.softmax(-1)) @ v
    return x + F.linear(attended.transpose(1, 2).flatten(2), out, out_bias)


def convolution_module(
    x: Tensor, *weights: Tensor, lengths: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    named, options = ops.ConvolutionWeights(*weights), {"epsilon": EPSILON, "dropout_p": dropout_p}
    return ops.convolution_module(x, named, lengths_frames=lengths, **options)


def convolution_module_in_torch(
    x: Tensor,
    norm_in: Tensor,
    norm_in_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    taps: Tensor,
    taps_bias: Tensor,
    norm_out: Tensor,
    norm_out_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    *,
    lengths: Tensor | None,
    keep: tuple[Tensor | float, ...] = (1.0,),
) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    real = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.dtype)
    count = (lengths.clamp(min=1) * x.shape[2])[:, None, None]

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = y.to(x.dtype)
        mean = (y * real).sum((1, 2), keepdim=True) / count
        centred = (y - mean) * real
        variance = centred.square().sum((1, 2), keepdim=True) / count
        return centred * (variance + EPSILON).rsqrt() * weight + bias

    y = F.glu(F.linear(norm(x, norm_in, norm_in_bias), up, up_bias), dim=-1) * real
    padding, groups = taps.shape[-1] // 2, len(taps)
    y = F.conv1d(y.mT, taps, taps_bias, padding=padding, groups=groups).mT
    y = F.linear(F.silu(norm(y, norm_out, norm_out_bias)), down, down_bias)
    return x + keep[0] * y * real


def near_one(*shape: int) -> Tensor:
    return 1 + 0.3 * torch.randn(shape)


def a_map(n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n_out, n_in) / n_in**0.5, 0.3 * torch.randn(n_out)


# shape of x, H, whether there is a norm
FEED_FORWARDS = {
    "one frame": ((1, 32), 32, True),
    "a vector": ((32,), 64, False),  # fails in plain torch: flatten(0, -2) of one dimension
    "as in the conformer": ((2, 37, 64), 256, False),
    "as in the head": ((3, 50, 96), 96, True),
    "odd frames": ((5, 13, 32), 160, True),
    "many rows": ((2, 2, 75, 32), 64, True),
    "narrower inside": ((40, 128), 32, True),
    "x that fills no panel": ((3, 11, 24), 96, True),
    "hidden values that fill no panel": ((3, 11, 32), 40, False),
}
# B, T, D, H, lengths
ATTENTIONS = {
    "one frame": (2, 1, 32, 2, None),
    "one row": (1, 20, 64, 1, (17,)),
    "ragged": (4, 33, 64, 4, (33, 1, 17, 32)),
    "a row of no frames": (3, 29, 96, 2, (12, 0, 29)),
    "no frames at all": (2, 9, 32, 1, (0, 0)),
    "many rows": (40, 3, 32, 2, None),
    "more than a tile": (1, 149, 64, 2, None),
    "heads that fill no vector": (2, 15, 32, 4, (15, 6)),
    "a width that fills no panel": (2, 15, 48, 3, (15, 6)),
}
# B, T, D, K, lengths
CONVOLUTIONS = {
    "one frame": (2, 1, 32, 31, None),
    "one row": (1, 41, 64, 15, (40,)),
    "ragged": (4, 65, 64, 31, (65, 1, 17, 64)),
    "a row of no frames": (3, 29, 96, 7, (12, 0, 29)),
    "no frames at all": (2, 9, 32, 3, (0, 0)),
    "many rows": (40, 3, 32, 5, None),
    "one tap": (2, 35, 32, 1, (35, 20)),
    "a row of several blocks": (1, 149, 32, 31, None),
    "a width that fills no panel": (2, 15, 24, 5, (15, 6)),
}


class Case(NamedTuple):
    """An operator, the same in plain torch, and what both take."""

    op: Callable[..., Tensor]
    in_torch: Callable[..., Tensor]
    leaves: list[Tensor]
    options: dict[str, object]


def feed_forward_case(name: str) -> Case:
    shape, H, has_norm = FEED_FORWARDS[name]
    D = shape[-1]
    norm = (near_one(D), torch.randn(D)) if has_norm else ()
    leaves = [torch.randn(shape), *a_map(H, D), *a_map(D, H), *norm]
    return Case(feed_forward, feed_forward_in_torch, leaves, {"scale": 0.5})


def attention_case(name: str) -> Case:
    B, T, D, H, lengths = ATTENTIONS[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    gates = [torch.randn(H, D // H) / 2, torch.randn(H, D // H) / 2, near_one(H)]
    leaves = [*a_map(3 * D, D), *a_map(D, D), torch.randn(H, 2 * T - 1), *gates]
    x = torch.randn(B, T, D)
    return Case(self_attention, self_attention_in_torch, [x, *leaves], {"lengths": lengths})


def convolution_case(name: str) -> Case:
    B, T, D, K, lengths = CONVOLUTIONS[name]
    lengths = None if lengths is None else torch.tensor(lengths)
    taps = (torch.randn(D, 1, K) / K**0.5, torch.randn(D))
    norms = [(near_one(D), torch.randn(D)) for _ in "12"]
    leaves = [*norms[0], *a_map(2 * D, D), *taps, *norms[1], *a_map(D, D)]
    options = {"lengths": lengths}
    x = torch.randn(B, T, D) + 0.5
    return Case(convolution_module, convolution_module_in_torch, [x, *leaves], options)


CASES = {
    **{f"feed-forward, {name}": (feed_forward_case, name) for name in FEED_FORWARDS},
    **{f"self-attention, {name}": (attention_case, name) for name in ATTENTIONS},
    **{f"convolution module, {name}": (convolution_case, name) for name in CONVOLUTIONS},
}
# One of each, of sizes that the native kernels take.
EACH = ("feed-forward, odd frames", "self-attention, ragged", "convolution module, ragged")


def case_of(name: str) -> Case:
    torch.manual_seed(0)
    make, key = CASES[name]
    return make(key)
