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
def group_and_block(T, H, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Head, first batch row and first frame of this program; blocks of one pair are neighbours.

    On one axis of the grid: the others end at 65,535.
    """
    n_blocks = tl.cdiv(T, BLOCK)
    pair = tl.program_id(0) // n_blocks
    return pair % H, pair // H * ROWS, tl.program_id(0) % n_blocks * BLOCK


@triton.jit
def batch_row(b0, r, B):
    """Row r of the group from b0 on; the last row of the batch once more where there is none."""
    return tl.minimum(b0 + r, B - 1)


@triton.jit
def keys_of(lengths_ptr, b, T, RAGGED: tl.constexpr):
    """Keys that batch row b has."""
    n_keys = T
    if RAGGED:
        n_keys = tl.minimum(tl.load(lengths_ptr + b), T).to(tl.int32)
    return n_keys


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
def without_bit_3(offs):
    """What i and i ^ 8 share. As a difference, which the compiler sees through in full."""
    return (offs - (offs & 8)).to(tl.uint32)


@triton.jit
def spread(frames):
    """What queries give to the number of a score, linear in exclusive or.

    Rotated by 16 it keeps apart all scores of 65,536 queries and keys. Rotated by 27 as well, it
    changes low bits where i and j move together: a hash mixes upwards. With 16 alone the masks of
    (i, j) and (i + 16,384, j + 16,384) have a correlation of 0.055 at a rate of 0.1; with both
    steps of 1 to 16,384 in i, j or both have none of more than 0.0016, of a noise of 0.0006.
    """
    return ((frames << 16) | (frames >> 16)) ^ ((frames << 27) | (frames >> 5))


@triton.jit
def is_kept(numbers, offs_i, offs_j, second, dropped):
    """Where a probability is kept: its word is at least `dropped` of 2^32.

    Four scores share a hash, those of queries i and i ^ 8 and of keys j and j ^ 8: one thread
    holds all of them, whichever of the two are the rows of a tile. Their number is
    first ^ spread(i) ^ j without bits 3, `first` and `second` being the words of a (batch, head)
    pair: a tile has it from a row and a column by one exclusive or. Two rounds of a
    multiplicative hash mix it, and a last step lends the lower bytes what the upper ones have;
    each score then reads the word from a byte of its own on, round its end. Tiles begin at
    multiples of 16: bits 3 of offsets are those of frames.
    """
    x = numbers * 0x7FEB352D
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B
    x ^= x >> 16
    turn = ((offs_i & 8) | ((offs_j & 8) * 2)).to(tl.uint32)
    return ((x << turn) | (x >> ((32 - turn) & 31))) >= dropped


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


@triton.jit
def laid_out_as_rows(values, q, BLOCK_J: tl.constexpr):
    """`values` (BLOCK_I,) on the threads that hold the rows of a product of q (BLOCK_I, D_PAD).

    A tile of the bias that is multiplied by them is then laid out as the product once, before,
    and not for every row of the batch.
    """
    nothing = tl.zeros_like(q)
    keys = tl.zeros((BLOCK_J, q.shape[1]), dtype=q.dtype)
    return values + tl.sum(tl.dot(nothing, tl.trans(keys)), 1)


class Tiles(NamedTuple):
    """Queries and keys of a tile, and the schedule, of one of the kernels."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int
    ROWS: int = 1
    """rows of the batch that share a tile of the bias"""
    maxnreg: int | None = None
    """registers of a thread at most"""


def config(kernel: str, D_pad: int, dtype: torch.dtype) -> Tiles:
    """Tile and schedule of "fwd", "bwd_q", "bwd_kv" or "bwd_table" (a square tile).

    Those of 16 bits and d up to 32 are chosen by instructions a score and registers, of which 168
    a thread leave room for twelve warps up to 16 (beyond, they would spill; not measured yet); the
    others by what compiles. In float32 heads of more than 64 spill some registers, in 16 bits
    those of 8 and of no power of two (bench/results/compile.jsonl has some of them).
    """
    if dtype == torch.float32:
        if D_pad > 32:
            return Tiles(16, 16, 8, 1)
        if kernel == "fwd" and D_pad <= 16:
            return Tiles(64, 32, 4, 2)
        return Tiles(32, 32, 4, 2) if D_pad <= 16 else Tiles(16, 16, 4, 2)
    if D_pad <= 32:
        most, warps = (168, 4) if D_pad <= 16 else (None, 8)
        return {
            "fwd": Tiles(64, 64, 4, 1, 2, most),
            "bwd_q": Tiles(64, 32, 4, 1, 2),
            "bwd_kv": Tiles(32, 64, 4, 1, 2),
            "bwd_table": Tiles(64, 64, warps, 1, 1, most),
        }[kernel]
    warps = 8 if D_pad > 64 else 4
    return Tiles(64, 64, warps, 2) if kernel == "fwd" else Tiles(32, 32, warps, 2)


def options_of(
    kernel: str, q: Tensor, dropout_p: float, key_lengths: Tensor | None
) -> dict[str, Any]:
    """Compile-time arguments of a kernel by `config`'s name."""
    B, _, _, D = q.shape
    D_pad = max(16, triton.next_power_of_2(D))
    tiles = config(kernel, D_pad, q.dtype)._asdict()
    if B == 1:  # the one size of a batch that is compiled apart: it has no second row to add
        tiles["ROWS"] = 1
    if kernel == "bwd_table":
        tiles["BLOCK"] = tiles.pop("BLOCK_I")
        del tiles["BLOCK_J"], tiles["ROWS"]
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


def grid_of(q: Tensor, BLOCK: int, ROWS: int) -> int:
    """Programs of BLOCK frames of ROWS rows of the batch each."""
    B, H, T, _ = q.shape
    return triton.cdiv(T, BLOCK) * triton.cdiv(B, ROWS) * H
