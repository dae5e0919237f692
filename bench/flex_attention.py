"""Gated-bias attention beside PyTorch's FlexAttention, forward on the CPU.

    python -m bench.flex_attention

FlexAttention has no backward pass on CPUs. One thread: with two, its compiled kernel with this bias
ends in "malloc(): unaligned tcache chunk detected" (torch 2.11), alone and without this package.
A line is appended to ``bench/results/flex_attention.jsonl``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.records import RESULTS, append, surroundings, take_turns
from gmm_jepa import ops
from gmm_jepa.models.attention import attention_with_bias

ROWS, HEADS, FRAMES, HEAD_DIM = 4, 32, 200, 16  # the small shape, heads of the default conformer


def main() -> None:
    """Compare, measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="turns of each side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, ROWS, HEADS, FRAMES, HEAD_DIM).unbind()
    table, gate = torch.randn(HEADS, 2 * FRAMES - 1), torch.rand(ROWS, HEADS, FRAMES)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[h, j - i + FRAMES - 1] * gate[b, h, i]

    compiled = torch.compile(flex_attention)
    sides = {
        "ours": lambda: ops.gated_bias_attention(q, k, v, table, gate),
        "FlexAttention, compiled": lambda: compiled(q, k, v, score_mod=score_mod),
        "torch, bias written out": lambda: attention_with_bias(q, k, v, table, gate),
    }
    with torch.no_grad():
        first, *others = (side() for side in sides.values())
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
        seconds = take_turns(sides, options.repeats)
    for name, taken in seconds.items():
        print(f"{name:24} {1e3 * taken['median']:8.2f} ms")
    shape = {"rows": ROWS, "heads": HEADS, "frames": FRAMES, "head_dim": HEAD_DIM}
    append("flex_attention", {**shape, "seconds": seconds, **surroundings()}, options.out)


if __name__ == "__main__":
    main()
