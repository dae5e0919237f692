"""What the kernels of gated-bias attention share: rows in memory, dropout, bias, tiles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
# Beside each head's positions, so that tiles that stick out read something without a mask.
MARGIN = tl.constexpr(128)


@triton.jit
def row_and_block(T, BLOCK: tl.constexpr):
    """(batch, head) pair and first frame of this program; blocks of one pair are neighbours.

    On one axis of the grid: the others end at 65,535 pairs.
    """
    n_blocks = tl.cdiv(T, BLOCK)
    return tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks * BLOCK


@triton.jit
def centre(head, T):
    """Where j = i is in the table with margins of a head."""
    return head.to(tl.int64) * (2 * T - 1 + 2 * MARGIN) + MARGIN + T - 1


@triton.jit
def rows_of(ptr, row, first, stride_b, stride_h, stride_t, H):
    """Where frame `first` of a (B, H, T, ...) tensor's (batch, head) pair `row` begins, 64 bits."""
    row = row.to(tl.int64)
    return ptr + row // H * stride_b + row % H * stride_h + (first + 0 * row) * stride_t


@triton.jit
def load_rows(ptr, offs_t, offs_d, mask_t, stride_t, stride_d, D: tl.constexpr):
    """(BLOCK, D_PAD) of the rows that begin at `ptr`, zero beyond."""
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    return tl.load(
        ptr + offs_t[:, None] * stride_t + offs_d[None, :] * stride_d, mask=mask, other=0.0
    )


@triton.jit
def store_rows(ptr, values, offs_t, offs_d, mask_t, stride_t, stride_d, D: tl.constexpr):
    """Store (BLOCK, D_PAD) in the rows that begin at `ptr`, in their dtype."""
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    ptrs = ptr + offs_t[:, None] * stride_t + offs_d[None, :] * stride_d
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def seeds_of(seed_ptr, row):
    """Two random words of a (batch, head) pair."""
    first, second, _, _ = tl.randint4x(tl.load(seed_ptr), row)
    return first.to(tl.uint32), second.to(tl.uint32)


@triton.jit
def score_numbers(frames, first, T):
    """What queries add to the number of a score, i T + j, and to the first of the two words."""
    return frames.to(tl.uint32) * T + first


@triton.jit
def is_kept(of_queries, of_keys, second, dropped):
    """Where a probability is kept: its number, mixed, is at least `dropped` of 2^32.

    Two rounds of a multiplicative hash; the upper bits, which decide, depend on all others.
    """
    x = of_queries + of_keys
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B
    return x >= dropped


@triton.jit
def threshold_of(dropout_p):
    """dropout_p of 2^32, uint32."""
    return tl.cast(dropout_p * 4294967296.0, tl.uint32)


@triton.jit
def bias_of(table_ptr, rows, columns):
    """table at columns - rows. Its margins make any block readable.

    64 bits, so that constants end up in the loads' offsets.
    """
    ptrs = (table_ptr + columns.to(tl.int64))[None, :]
    return tl.load(ptrs - rows.to(tl.int64)[:, None])


class Tiles(NamedTuple):
    """Queries and keys of a tile, and the schedule, of one of the kernels."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int


def config(kernel: str, D_pad: int, dtype: torch.dtype) -> Tiles:
    """Tile and schedule of "fwd", "bwd_q", "bwd_kv" or "bwd_table" (a square tile).

    Those of 16 bits and d up to 32 on one H200, bf16, d = 16, B H T^2 = 576 M scores, dropout,
    the best of eight: fwd 0.85 ms (64 x 64: 0.98), bwd_table 0.79 (2 stages and 8 warps: 1.61).
    bwd_q and bwd_kv took 3.5 and 1.5 ms with two stages, whose copies of the bias met in the banks
    of shared memory; with one stage there are none (not measured yet). The others are
    chosen by what compiles; in float32 heads of more than 32 spill some registers
    (bench/results/compile.jsonl).
    """
    if dtype == torch.float32:
        if D_pad > 32:
            return Tiles(16, 16, 8, 1)
        if kernel == "fwd" and D_pad <= 16:
            return Tiles(64, 32, 4, 2)
        return Tiles(32, 32, 4, 2) if D_pad <= 16 else Tiles(16, 16, 4, 2)
    if D_pad <= 32:
        return {
            "fwd": Tiles(64, 32, 4, 3),
            "bwd_q": Tiles(128, 32, 4, 1),
            "bwd_kv": Tiles(32, 128, 4, 1),
            "bwd_table": Tiles(64, 64, 4, 1),
        }[kernel]
    warps = 8 if D_pad > 64 else 4
    return Tiles(64, 64, warps, 2) if kernel == "fwd" else Tiles(32, 32, warps, 2)


def options_of(
    kernel: str, q: Tensor, dropout_p: float, key_lengths: Tensor | None
) -> dict[str, Any]:
    """Compile-time arguments of a kernel by `config`'s name."""
    D = q.shape[3]
    D_pad = max(16, triton.next_power_of_2(D))
    tiles = config(kernel, D_pad, q.dtype)._asdict()
    if kernel == "bwd_table":
        tiles["BLOCK"] = tiles.pop("BLOCK_I")
        del tiles["BLOCK_J"]
    return {
        "D": D,
        "D_PAD": D_pad,
        "RAGGED": key_lengths is not None,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        **tiles,
    }


def with_margins(table: Tensor) -> Tensor:
    """(H, 2 T - 1) -> (H, 2 T - 1 + 2 MARGIN) float32, contiguous."""
    return F.pad(table.float(), (MARGIN.value, MARGIN.value))
